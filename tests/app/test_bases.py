"""Bases beside pocket: found, chosen, drawn with, and named by commands."""

import threading

import numpy as np
import pytest
from PIL import Image

from sbora_diffusion.app.bases import POCKET, choose_base, found_bases
from sbora_diffusion.app.drawing import Request, Studio
from sbora_diffusion.app.engine import Engine
from sbora_diffusion.app.workspace import Handout, Workspaces
from sbora_diffusion.core.errors import ConfigError, SboraError
from tests.diffusion.thin_sd15 import thin_sd15


@pytest.fixture(scope="module")
def home(pocket, tmp_path_factory):
    """The app's folder, with a model folder of random weights, a checkpoint that is none, and what
    is no model."""
    places = Workspaces(tmp_path_factory.mktemp("app") / "library.sqlite3")
    bases = places.home / "bases"
    thin_sd15(pocket).pipeline.save_pretrained(bases / "thin")
    (bases / "broken.safetensors").write_bytes(b"nothing")
    (bases / "notes").mkdir()
    (bases / "notes.txt").write_text("no model")
    return places


def test_folders_and_checkpoints_beside_the_library_are_offered(home):
    assert list(found_bases(home.home))[:3] == ["pocket", "broken.safetensors", "thin"]


def test_a_model_folder_is_chosen_drawn_with_and_named_by_commands(home):
    engine, space = Engine(), home.of(None)
    asked = Request("a photo of a dog", {}, seed=3, steps=1)
    studio = Studio(space, engine, Handout())

    def draw():
        outcome = studio.draw(asked, lambda *_: None, threading.Event())
        return np.asarray(Image.open(outcome.files[0])), outcome.command

    before, plain = draw()
    chosen = choose_base(space.folder, home.home, "thin", engine)
    assert space.base == chosen and chosen.key.startswith("sd1-")
    assert space.cards() == ([], [])  # the examples belong to pocket
    other, command = draw()
    assert not np.array_equal(before, other)
    assert "--base" not in plain and f"--base {home.home / 'bases' / 'thin'}" in command
    with pytest.raises(SboraError, match="broken"):
        choose_base(space.folder, home.home, "broken.safetensors", engine)
    with pytest.raises(ConfigError, match="no base"):
        choose_base(space.folder, home.home, "../../etc", engine)
    assert space.base == chosen
    choose_base(space.folder, home.home, "pocket", engine)
    assert space.base == POCKET and np.array_equal(draw()[0], before)
