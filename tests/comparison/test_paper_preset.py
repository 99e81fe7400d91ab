"""The paper's comparison from end to end: only the weights are missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from sbora_diffusion.diffusion.baselines.fusion import FusionConfig, fusing
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.baselines.sbora import calibrating
from sbora_diffusion.diffusion.moments import CalibrateConfig
from tests.conftest import CONCEPTS
from tests.diffusion.thin_sd15 import thin_sd15

FUSING = fusing(FusionConfig(steps=1, text_iterations=2, spatial_iterations=2))
CALIBRATION = CalibrateConfig(prompts=("a photo of {}",), generic=2, steps=1)
REFINED = CALIBRATION.model_copy(update={"refine": 1, "refine_rows": 1, "refine_timesteps": 1})
QUICK = {
    "fusion": FUSING,
    "calibrated": calibrating(CALIBRATION),
    "refined": calibrating(REFINED),
}
CATEGORIES = {"plushbear": "character", "toytrain": "object"}


@pytest.fixture(autouse=True)
def quick_merges(monkeypatch):
    """Merges are fitted in a moment."""
    for name, method in METHODS.items():
        for way, merge in list(method.merges.items()):
            if (into := QUICK.get(way.partition("-")[0])) is not None:
                monkeypatch.setitem(METHODS[name].merges, way, replace(merge, into=into))


def write_model(pocket) -> Path:
    """Stable Diffusion 1.5's modules, layout and widths with random weights. It is no full-size
    model: fewer blocks and small pictures, and the pocket's words and autoencoder, for time."""
    thin_sd15(pocket).pipeline.save_pretrained("model")
    return Path("model")


def write_clip() -> Path:
    """OpenAI's ViT-B/32 as open_clip builds it, in its own size, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    folder = Path("clip")
    folder.mkdir()
    config = {
        "model_cfg": open_clip.get_model_config("ViT-B-32-quickgelu"),
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.slow
def test_the_papers_tables_are_made_from_nothing_by_random_weights(pocket, sbora):
    model, clip = write_model(pocket), write_clip()
    for name in CATEGORIES:
        shutil.copytree(CONCEPTS / name, Path("concepts/mix_of_show") / name)
    small = {"steps": 1, "batch_size": 1, "copies": 1, "prior_images": 1}
    common = ", ".join(f"{key} = {value}" for key, value in small.items())
    shared = (
        "--preset", "paper", "--base", model, "--clip", f"local-dir:{clip}", "--device", "cpu",
        "-s", "num=1", "-s", "steps=1", "-s", f"common={{ {common} }}",
    )  # fmt: skip
    merged = ("--methods", "custom-diffusion,mix-of-show,orthogonal,sbora-fa,sbora")
    for command, chosen in (("single", ()), ("merge", merged)):
        status, _, err = sbora("bench", command, *shared, *chosen, "--commit", "abc")
        assert status == 0, err
        assert sbora("bench", command, *shared, "--render")[0] == 0
    lines = [json.loads(x) for x in Path("results/single/paper.jsonl").read_text().splitlines()]
    assert {x["method"] for x in lines} == {
        "class-word", "custom-diffusion", "mix-of-show", "orthogonal", "sbora-fa", "sbora-fb",
        "sbora", "lora",
    }  # fmt: skip
    assert {(x["concept"], x["category"]) for x in lines} == set(CATEGORIES.items())
    for line in lines:
        assert "broken" not in line and line["setting"]["wording"] == "benchmark"
        figures = line["alone"]["mix-of-show"]
        assert figures["pictures"] == 20 and "clip, first-reference" in figures["image_alignment"]
    page = Path("docs/methods_paper.md").read_text()
    assert "| Custom Diffusion" in page and "0.7893?" in page and "0.7454" in page
    assert "2 concepts in one model" in page and "| gradient fusion |" in page
