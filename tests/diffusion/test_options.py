"""Options of a training: each does what it says, and goes on from a checkpoint bit for bit."""

import builtins
import shutil

import pytest
import torch
from PIL import Image

from sbora_diffusion.core.checkpoints import CheckpointFolder
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import load_examples, open_mask
from sbora_diffusion.diffusion.optimizers import optimizer_named
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.conftest import CONCEPTS
from tests.diffusion.thin_pocket import thin_pocket

PLAIN = {"steps": 4, "copies": 2, "batch_size": 2, "preservation": 0.0, "rank": 64}
OPTIONS = {
    "adamw": {},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "prodigy": {"optimizer": "prodigy"},
    "ema": {"ema": 0.9},
    "masked": {"masked_loss": True},
    "buckets": {"aspect_buckets": True, "masked_loss": True, "resolution": 64, "steps": 6},
    "checkpointing": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "cached": {"rate_tokens": 0.0, "rate_text_encoder": 0.0},
}


@pytest.fixture(scope="module")
def base(pocket):
    return thin_pocket(pocket)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    """Two pictures, the first one's right half transparent, the second twice as wide as high."""
    folder = tmp_path_factory.mktemp("subject") / "plushbear"
    folder.mkdir()
    shutil.copy(CONCEPTS / "plushbear" / "concept.toml", folder)
    first, second = read_subject(CONCEPTS / "plushbear").images[:2]
    image = Image.open(first).convert("RGBA")
    image.paste((255, 255, 255, 0), (image.width // 2, 0, image.width, image.height))
    image.save(folder / "1.png")
    wide = Image.open(second).convert("RGB")
    wide.crop((0, 0, wide.width, wide.height // 2)).save(folder / "2.png")
    return read_subject(folder)


def trained(base, subject, stop: int | None = None, resumed=None, **settings):
    """The concept, the losses, and the state when the steps ended."""
    config = TrainConfig(**{**PLAIN, **settings})
    training = ConceptTraining(base, subject, config, 0)
    training.resumed, losses = resumed, []
    try:
        for record in training.steps():
            losses.append(record.loss)
            if record.step == stop:
                break
        return training.concept(), losses, training.state.content()
    finally:
        training.close()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_training_goes_on_bit_for_bit(base, subject, tmp_path, option):
    settings = OPTIONS[option]
    whole, losses, _ = trained(base, subject, **settings)
    _, before, content = trained(base, subject, stop=2, **settings)
    CheckpointFolder(tmp_path).write(2, content)
    read = CheckpointFolder(tmp_path).newest(print)
    resumed, after, _ = trained(base, subject, resumed=read, **settings)
    assert [*before, *after] == losses
    assert resumed.meta.digest == whole.meta.digest


@pytest.fixture(scope="module")
def plain(base, subject) -> Concept:
    return trained(base, subject)[0]


@pytest.mark.parametrize("option", ["adamw8bit", "prodigy", "ema", "masked"])
def test_an_option_gives_another_concept(base, subject, plain, option):
    assert trained(base, subject, **OPTIONS[option])[0].meta.digest != plain.meta.digest


def test_eight_bits_hold_the_moments_of_large_factors(base, subject):
    tensors = trained(base, subject, optimizer="adamw8bit")[2].tensors["optimizer"]
    assert {t.dtype for n, t in tensors.items() if n.endswith("state1")} >= {torch.int32}


def test_an_average_is_what_its_formula_gives(base, subject):
    """The first step is taken whole; of the state after it 2/11 stay in the second."""
    first, second = (trained(base, subject, steps=n)[0] for n in (1, 2))
    averaged = trained(base, subject, steps=2, ema=0.9)[0]
    for name, layer in averaged.layers.items():
        expected = 2 / 11 * first.layers[name].factor + 9 / 11 * second.layers[name].factor
        torch.testing.assert_close(layer.factor, expected, rtol=1e-5, atol=1e-8)


def test_what_is_hidden_does_not_count(base, subject):
    examples = load_examples(subject, 64, 3, True, 0, masked=True)
    first, mirrored = examples[0].mask, examples[1].mask
    assert first.shape == (1, 64, 64)
    assert first[0, :, :28].min() == 1 and first[0, :, 36:].max() == 0
    assert torch.equal(mirrored, first.flip(-1))
    assert examples[3].mask.min() == 1  # the second picture has no transparency
    plain = load_examples(subject, 64, 3, True, 0)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(plain, examples, strict=True))


def test_a_mask_of_ones_changes_nothing_but_rounding(base):
    opaque = read_subject(CONCEPTS / "baseballcap")
    one, other = (trained(base, opaque, steps=1, masked_loss=on)[1] for on in (False, True))
    assert one == pytest.approx(other, rel=1e-5)


def test_masks_count_beside_preserved_rows_and_prior_pictures(base, subject, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.diffusion.preservation.PICTURES", 4)
    monkeypatch.setattr("sbora_diffusion.diffusion.preservation.NOISED", 1)
    more = {"preservation": 1.0, "prior_weight": 0.5, "prior_images": 1, "steps": 1}
    assert trained(base, subject, masked_loss=True, **more)[1][0] > 0


def test_a_picture_that_is_all_transparent_is_refused(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is transparent everywhere"):
        open_mask(tmp_path / "a.png")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith(("bitsandbytes", "prodigyopt")):
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in ("adamw8bit", "prodigy"):
        with pytest.raises(ConfigError, match=r"needs a package that is missing: .*\[opt\]"):
            optimizer_named(name, [], 0.0, False)
