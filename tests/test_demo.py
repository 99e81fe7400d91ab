import copy
import json

import pytest
import torch
from PIL import Image

from sbora_diffusion.console import Console
from sbora_diffusion.contact_sheet import Sheet
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.demo import DEMO, demo_folders, run_demo
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.probe import denoising_error
from tests.conftest import TINY

QUICK = TINY.model_copy(update={"steps": 1})
FEW = CalibrateConfig(prompts=("a photo of {}",), generic=1, steps=1)


def test_the_demo_writes_all_it_promises_and_leaves_the_base_as_it_was(pocket, tmp_path, capsys):
    before = copy.deepcopy(pocket.pipeline.unet.state_dict())
    record = run_demo(pocket, tmp_path, Console(), QUICK, 1, FEW)
    assert json.loads((tmp_path / "demo.json").read_text()) == record
    assert {path.name for path in tmp_path.iterdir()} == {
        "demo.json",
        "demo.png",
        "library.sqlite3",
        "merged",
        *(f"{name}.safetensors" for name in DEMO),
    }
    starts = [read_concept(tmp_path / f"{name}.safetensors").meta.start for name in DEMO]
    assert starts == [0, 8]
    assert (tmp_path / "merged" / "model_index.json").is_file()
    assert "how well the model redraws the references" in capsys.readouterr().out
    after = pocket.pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_demo_never_replaces_a_folder_that_is_not_its_own(pocket, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "diary.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not the demo's"):
        run_demo(pocket, tmp_path, Console(), QUICK)
    assert (tmp_path / "merged" / "diary.txt").read_text() == "keep me"


def test_the_demos_concepts_are_found():
    assert [folder.name for folder in demo_folders()] == list(DEMO)


def test_the_denoising_error_is_fixed_by_its_seed_and_depends_on_the_caption(pocket):
    pictures = [torch.zeros(3, 64, 64)]
    error = denoising_error(pocket, pictures, "a cat")
    assert 0 < error < 10
    assert denoising_error(pocket, pictures, "a cat") == error
    assert denoising_error(pocket, pictures, "a dog in the snow") != error


def test_a_sheet_places_pictures_in_columns_and_ignores_what_does_not_fit():
    sheet = Sheet(columns=2)
    sheet.heading("left", "right")
    sheet.row([(Image.new("RGB", (4, 4), color), "") for color in ("red", "lime", "blue")])
    colors = {color for _, color in sheet.image().getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 255, 0)} <= colors
    assert (0, 0, 255) not in colors
