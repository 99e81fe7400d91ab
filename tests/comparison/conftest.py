"""A comparison small enough to be run in a moment: a thin base, a tiny judge, three concepts."""

import gc
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from sbora_diffusion.comparison import figure, measuring
from sbora_diffusion.comparison.opening import Asked, open_work
from sbora_diffusion.comparison.preset import Preset, load_preset
from sbora_diffusion.comparison.work import Work
from sbora_diffusion.diffusion import bases
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.training_loop import StepRecord, TrainingLoop
from sbora_diffusion.evaluation.features import EfficientNetFeatures
from tests.conftest import CONCEPTS
from tests.diffusion.helpers import assert_untouched, snapshot
from tests.diffusion.thin_pocket import thin_pocket
from tests.evaluation.tiny_clip import write_tiny_clip

NAMES = ("baseballcap", "plushbear", "toytrain")
TUNED_ON = ("bluevase", "trex")
PRESET = f"""
base = "pocket"
clip = "CLIP"
wording = "pocket"
concepts_folder = "{CONCEPTS}"
concepts = {list(NAMES)}
seeds = [0, 1]
num = 1
steps = 1
guidance = 1.0
together = [2]
tuned = "tuning.json"
page = "page.md"
common = {{ steps = 1, batch_size = 1, copies = 1, resolution = 32, preservation = 0.0, rank = 4 }}

[methods]
class-word = {{ method = "class-word", merged = false }}
sbora-fa = {{ method = "sbora-fa", grid = "weights" }}
lora = {{ method = "lora", grid = "weights" }}
words = {{ method = "textual-inversion", grid = "words", merged = false }}

[methods.lora-half]
method = "lora"
title = "LoRA, half"
changes = {{ rank = 2 }}
tuned_as = "lora"
merged = false

[tables]
equal-rank = ["class-word", "lora", "sbora-fa"]
equal-parameters = ["lora-half", "sbora-fa"]

[tuning]
folder = "{CONCEPTS}"
subjects = {list(TUNED_ON)}

[tuning.grids.weights]
rates = [{{ rate_unet = 1e-3 }}, {{ rate_unet = 1e-2 }}]

[tuning.grids.words]
rates = [{{ rate_tokens = 1e-3 }}, {{ rate_tokens = 1e-2 }}]
"""


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def thin(pocket) -> Base:
    return thin_pocket(pocket)


@pytest.fixture(autouse=True)
def small_world(monkeypatch, tmp_path):
    """The working directory is empty, and there is one judge."""
    monkeypatch.setattr(EfficientNetFeatures, "installed", staticmethod(lambda: False))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_base(thin, monkeypatch):
    """Commands find the thin base, and leave it as it was."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # Accelerate's, most of a short training
    monkeypatch.setattr(bases, "load_base", lambda *_: thin)
    before = snapshot(thin)
    yield thin
    assert not thin.folded
    assert_untouched(thin, before)


def coloured(base, prompts, seeds, how, at_once):
    """A colour for each prompt, seed and state of the base, in place of a picture."""
    layers = target_layers(base.pipeline).values()
    words = base.pipeline.text_encoder.get_input_embeddings().weight[-4:]
    tensors = [words, *(layer.weight for layer in layers)]
    state = sum(tensor.double().abs().sum().item() for tensor in tensors)
    for prompt, seed in zip(prompts, seeds, strict=True):
        rng = random.Random(f"{prompt} {seed} {state:.6f} {how['steps']}")
        yield Image.new("RGB", (8, 8), tuple(rng.randrange(256) for _ in range(3)))


@torch.no_grad()
def moved(training):
    """In place of optimizer steps: what is trained moves at random, as far as the rates say."""
    config = training.config
    generator = torch.Generator().manual_seed(config.seed)
    factors = [p for part in ("unet", "text_encoder") for p in training._factors(part)]
    for rate, parameters in (
        (config.rate_unet, factors),
        (config.rate_tokens, [training.trainable.vectors]),
    ):
        for parameter in parameters:
            parameter += (0.01 + rate) * torch.randn(parameter.shape, generator=generator)
    yield StepRecord(1, 1, 0.0, 1.0, 0.0)


@pytest.fixture
def quick(monkeypatch):
    """Nothing is drawn, and nothing learned."""
    monkeypatch.setattr(measuring, "drawn", coloured)
    monkeypatch.setattr(figure, "drawn", coloured)
    monkeypatch.setattr(TrainingLoop, "steps", moved)


@pytest.fixture
def preset_file(clip) -> Path:
    file = Path("small.toml")
    file.write_text(PRESET.replace("CLIP", clip), encoding="utf-8")
    return file


@pytest.fixture
def preset(preset_file) -> Preset:
    return load_preset(str(preset_file))


@pytest.fixture
def work(preset, small_base):
    """What gives a process's work of a preset."""

    def opened(own: Preset = preset, out: str = "record", **options) -> Work:
        options = {"files": Path("files"), "command": "sbora bench", "commit": "abc", **options}
        return open_work(own, lambda: small_base, Asked(out=Path(out), **options))

    return opened
