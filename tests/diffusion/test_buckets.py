"""Aspect buckets: pictures keep their aspect, and a batch holds one size."""

from collections import Counter

import pytest
import torch
from PIL import Image

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion import graphs, preservation
from sbora_diffusion.diffusion.buckets import LONGEST, bucket_of, bucket_sizes
from sbora_diffusion.diffusion.concepts import ConceptSettings, Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import load_examples
from sbora_diffusion.diffusion.drawing import RecordedUNet
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.noise import Objective
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.group_jobs import group_size
from tests.diffusion.tape import Recorder
from tests.diffusion.test_dataset import picture
from tests.diffusion.thin_families import NAMES, thin_family
from tests.diffusion.thin_pocket import thin_pocket

SETTINGS = ConceptSettings(name="toy", class_noun="toy", token="<toy>")
QUICK = {
    "steps": 3, "batch_size": 4, "copies": 2, "resolution": 64, "preservation": 0.0,
    "aspect_buckets": True, "rank": 4,
}  # fmt: skip
SHAPES = {"wide": (90, 30), "square": (50, 50), "other square": (64, 60), "line": (1200, 2)}
"""Name → width and height; of three buckets, two with one picture."""


@pytest.fixture(scope="module")
def base(pocket):
    return thin_pocket(pocket)


def subject_of(folder, shapes, hidden: bool = False) -> Subject:
    """Pictures of these shapes, of `hidden` ones the right half transparent."""
    images = []
    for name, size in shapes.items():
        image = picture(*size).convert("RGBA" if hidden else "RGB")
        if hidden:
            clear = (0, 0, 0, 0)
            image.paste(Image.new("RGBA", size, clear), (size[0] // 2, 0))
        images.append(folder / f"{name}.png")
        image.save(images[-1])
    return Subject(settings=SETTINGS, images=tuple(images))


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return subject_of(tmp_path_factory.mktemp("shapes"), SHAPES)


def trained(base, subject, **settings):
    training = ConceptTraining(base, subject, TrainConfig(**QUICK | settings), 0)
    try:
        losses = [record.loss for record in training.steps()]
        return training.concept(), losses, training.obstacle
    finally:
        training.close()


@pytest.mark.parametrize(("side", "unit"), [(128, 32), (512, 64), (1024, 64), (96, 32), (32, 64)])
def test_buckets_have_the_squares_area_or_less_and_both_directions(side, unit):
    sizes = bucket_sizes(side, unit)
    square = max(unit, side // unit * unit)
    assert (square, square) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert max(height, width) <= LONGEST * min(height, width)
        assert 0.6 * square**2 <= height * width <= square**2


def test_a_picture_gets_the_bucket_of_the_nearest_aspect():
    assert bucket_of((500, 500), 1024, 64) == (1024, 1024)
    assert bucket_of((1080, 1920), 1024, 64) == (768, 1344)  # SDXL has it, too
    assert bucket_of((1920, 1080), 1024, 64) == (1344, 768)
    assert bucket_of((1, 30_000), 512, 64) == (256, 1024)
    assert bucket_of((30_000, 1), 512, 64) == (1024, 256)


def test_a_picture_keeps_its_ends_which_a_square_cuts_off(tmp_path):
    subject = subject_of(tmp_path, {"wide": (90, 30), "square": (50, 50)})
    wide, square = load_examples(subject, 64, 1, True, 0, unit=32)
    assert wide.pixels.shape == (3, 32, 96) and square.pixels.shape == (3, 64, 64)
    # Across, the picture's red goes from black to bright; a square would have cut off its ends.
    assert wide.pixels[0, :, 0].max() < -0.95 and wide.pixels[0, :, -1].min() > 0.95
    plain = load_examples(subject, 64, 1, True, 0)
    assert torch.equal(plain[1].pixels, square.pixels)
    assert plain[0].pixels[0, :, 0].min() > -0.5


def test_a_batch_has_one_size_and_every_picture_comes_as_often(base, subject):
    lesson = Lesson(base, subject, TrainConfig(**QUICK), 0)
    ((own,),) = [lesson.streams()]
    objective = Objective(base.pipeline.scheduler.config, 0.0, None)
    rows = Counter()
    for _ in range(300):
        drawn, captions = own.draw(objective, 4)
        assert len(drawn.latents) == len(captions) == 4
        rows[tuple(drawn.latents.shape[2:])] += 1
    shares = {size: count / 300 for size, count in rows.items()}
    # Two squares of four pictures; latents are a quarter as wide, the line as wide as can be.
    assert shares == pytest.approx({(16, 16): 0.5, (8, 24): 0.25, (8, 32): 0.25}, abs=0.08)


def test_the_same_seed_gives_the_same_concept_and_another_seed_another_one(base, subject):
    one, again, other = (trained(base, subject, seed=seed) for seed in (1, 1, 2))
    assert one[0].meta.digest == again[0].meta.digest != other[0].meta.digest
    assert one[1] == again[1] and all(loss > 0 for loss in one[1])


def test_squares_alone_are_trained_as_without_buckets_bit_for_bit(base, tmp_path):
    subject = subject_of(tmp_path, {"square": (50, 50)})
    bucketed, losses, _ = trained(base, subject)
    plain, expected, _ = trained(base, subject, aspect_buckets=False)
    assert losses == expected
    for name, layer in plain.layers.items():
        assert torch.equal(bucketed.layers[name].factor, layer.factor)


def test_a_single_picture_that_is_no_square_trains(base, tmp_path):
    subject = subject_of(tmp_path, {"tall": (30, 80)})
    assert trained(base, subject, copies=1, flip=False)[1][-1] > 0


def test_masks_have_their_pictures_sizes_beside_preserved_rows(base, tmp_path, monkeypatch):
    monkeypatch.setattr(preservation, "PICTURES", 4)
    monkeypatch.setattr(preservation, "NOISED", 1)
    subject = subject_of(tmp_path, SHAPES, hidden=True)
    settings = TrainConfig(**QUICK | {"masked_loss": True, "preservation": 1.0})
    lesson = Lesson(base, subject, settings, 0)
    for example in lesson.examples:
        assert example.mask.shape[1:] == example.pixels.shape[1:]
        width = example.mask.shape[-1]
        seen = example.mask[..., : width // 4], example.mask[..., -(width // 4) :]
        assert sorted(part.mean().item() for part in seen) == pytest.approx([0, 1], abs=0.02)
    assert len(lesson.preserved) == 3
    (own,) = lesson.streams()
    objective = Objective(base.pipeline.scheduler.config, 0.0, None)
    for _ in range(8):
        drawn, _ = own.draw(objective, 2)
        assert drawn.weight.shape == (3, 1, *drawn.latents.shape[2:])
    assert trained(base, subject, masked_loss=True, preservation=1.0)[1][-1] > 0


def test_each_size_is_recorded_once_where_graphs_are(base, subject, monkeypatch):
    _, expected, _ = trained(base, subject, steps=8)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "CAPABLE", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "capture", recorder)
    try:
        _, losses, obstacle = trained(base, subject, steps=8)
    finally:
        base.recorded = RecordedUNet()
    assert obstacle is None and losses == pytest.approx(expected, rel=1e-4)
    assert recorder.recorded == 3 and recorder.played == 8


@pytest.mark.parametrize("family", NAMES)
def test_every_family_trains_sizes_that_are_no_squares(family, pocket, tmp_path):
    subject = subject_of(tmp_path, {"wide": (90, 30), "tall": (30, 90)})
    base = thin_family(family, pocket)
    losses = trained(base, subject, copies=1, batch_size=1, steps=2)[1]
    assert all(0 < loss < float("inf") for loss in losses)


def test_subjects_with_buckets_train_one_after_another(base, subject):
    config = TrainConfig(**QUICK)
    assert group_size(base, config, 3, None) == 1
    with pytest.raises(ConfigError, match="--at-once must be 1 with dropout, fp16 or aspect"):
        group_size(base, config, 3, 2)
    with pytest.raises(ConfigError, match="aspect buckets; train them one after another"):
        GroupTraining(base, [Lesson(base, subject, config, 0)])
