"""The study of two concepts in one picture: LoRA as the peer, crops, figures and their controls."""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.regions import Box, Regions
from sbora_diffusion.diffusion.targets import target_layers
from tests.conftest import CONCEPTS, TINY
from tests.diffusion.helpers import assert_untouched, snapshot

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
crops = importlib.import_module("pair_study.crops")
drawing = importlib.import_module("pair_study.drawing")
judging = importlib.import_module("pair_study.judging")
lora = importlib.import_module("pair_study.lora")
plan = importlib.import_module("pair_study.plan")
training = importlib.import_module("pair_study.training")

NAMES = ("plushbear", "baseballcap")
QUICK = TINY.model_copy(update={"rank": 2, "rate_unet": 0.02, "rate_text_encoder": 0.02})
SMALL = (64, 64)  # pixels
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def trained(pocket) -> dict:
    """Two LoRAs after two steps; training leaves the base as it was, bit for bit."""
    before = snapshot(pocket)
    found = {
        name: training.trained_lora(pocket, read_subject(CONCEPTS / name), QUICK) for name in NAMES
    }
    assert_untouched(pocket, before)
    assert all(len(losses) == QUICK.steps for _, losses in found.values())
    return {name: trained for name, (trained, _) in found.items()}


@pytest.fixture(scope="module")
def loras(trained) -> dict:
    """The same with up factors that are large enough to change pictures clearly."""
    found = {}
    for name, weak in trained.items():
        generator = torch.Generator().manual_seed(len(name))
        factors = {
            layer: (down, 0.05 * torch.randn(up.shape, generator=generator))
            for layer, (down, up) in weak.factors.items()
        }
        found[name] = lora.Lora(weak.meta, factors, weak.vectors)
    return found


@pytest.fixture
def live(pocket):
    """A pipeline of LoRAs; afterwards the base must be as it was, bit for bit."""
    before, processors = snapshot(pocket), pocket.pipeline.unet.attn_processors
    pipeline = lora.LoraPipeline(pocket)
    yield pipeline
    pipeline.switch([])
    assert_untouched(pocket, before)
    assert pocket.pipeline.unet.attn_processors == processors


# LoRA


def test_training_moves_both_factors_and_the_token(pocket, trained):
    subject, after = read_subject(CONCEPTS / "plushbear"), trained["plushbear"]
    start = lora.LoraTraining(pocket, subject, QUICK, start=0)
    try:
        before = start.lora()
    finally:
        start.close()
    for layer, (down, up) in after.factors.items():
        assert not before.factors[layer][1].any() and up.any()
        assert not torch.equal(down, before.factors[layer][0])  # from the second step on
    assert not torch.equal(after.vectors, before.vectors)


def test_a_lora_of_half_the_rank_has_about_the_parameters_of_sbora(pocket, loras):
    sbora = sum(8 * layer.out_features for layer in target_layers(pocket.pipeline).values())
    rank_4 = loras["plushbear"].parameters * 4 // QUICK.rank
    assert rank_4 == pytest.approx(sbora, rel=0.05)


def test_a_lora_file_gives_back_what_was_written(loras, tmp_path):
    path = tmp_path / "deep" / "plushbear.safetensors"
    lora.write_lora(path, loras["plushbear"])
    read = lora.read_lora(path)
    assert read.meta == loras["plushbear"].meta
    assert torch.equal(read.vectors, loras["plushbear"].vectors)
    assert read.factors.keys() == loras["plushbear"].factors.keys()
    for layer, factors in read.factors.items():
        assert all(map(torch.equal, factors, loras["plushbear"].factors[layer]))


def test_a_lora_of_another_base_is_refused_and_changes_nothing(live, loras):
    meta = loras["plushbear"].meta.model_copy(update={"base_key": "pocket-other"})
    other = lora.Lora(meta, loras["plushbear"].factors, loras["plushbear"].vectors)
    with pytest.raises(BaseMismatch, match="pocket-other"):
        live.switch([loras["baseballcap"], other])
    assert live.concepts == {}


def test_one_lora_in_the_whole_picture_is_the_ungated_result(live, loras):
    live.switch([loras["plushbear"]])
    texts = ["a photo of <plushbear> on grass", "<plushbear> in space"]
    sampler = Regions(live, {"plushbear": Box(0, 0, 1, 1)})
    free = draw_latents(live.base, texts, [1, 2], 1, 4.0, size=SMALL)
    torch.testing.assert_close(sampler(live.base, texts, [1, 2], 1, 4.0, size=SMALL), free)
    assert live.base.pipeline.unet.peft_config  # still attached
    after = draw_latents(live.base, texts, [1, 2], 1, 4.0, size=SMALL)
    torch.testing.assert_close(after, free)


def test_two_loras_act_together_and_leave_one_by_one(live, loras):
    text = ["a photo of <plushbear> next to <baseballcap>"]

    def drawn(*names):
        live.switch([loras[name] for name in names])
        return draw_latents(live.base, text, [0], 1, 1.0, size=SMALL)

    one, both, other = drawn("plushbear"), drawn(*NAMES), drawn("baseballcap")
    assert (both - one).abs().max() > 0.01 and (both - other).abs().max() > 0.01
    assert torch.equal(drawn("plushbear"), one)


def test_regions_gate_loras_outside_their_box(live, loras):
    live.switch([loras[name] for name in NAMES])
    text = [
        "a photo of <plushbear> next to <baseballcap>",
        "a photo of <baseballcap> next to <plushbear>",
    ]
    sided = drawing.SidedRegions(live)(live.base, text, [3, 3], 1, 1.0, size=SMALL)
    boxes = {"plushbear": plan.LEFT, "baseballcap": plan.RIGHT}
    for row, order in enumerate((boxes, dict(zip(boxes, reversed(boxes.values()), strict=True)))):
        alone = Regions(live, order)(live.base, text[row : row + 1], [3], 1, 1.0, size=SMALL)
        torch.testing.assert_close(sided[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    assert (sided - draw_latents(live.base, text, [3, 3], 1, 1.0, size=SMALL)).abs().max() > 0.01


# The plan


def test_parts_cover_all_pairs_once():
    pairs = plan.all_pairs([f"n{k:02}" for k in range(14)])
    assert len(pairs) == 91
    for parts in (1, 7, 14, 91, 100):
        shares = [plan.part_of(pairs, part, parts) for part in range(parts)]
        assert list(itertools.chain(*shares)) == pairs


def test_each_concept_is_left_in_half_of_a_pairs_pictures_and_seeds_differ_between_pairs():
    tokens = {name: f"<{name}>" for name in "abc"}
    pairs = plan.all_pairs("cab")
    seeds = []
    for pair in pairs:
        pictures = plan.pictures_of(pairs, pair, tokens)
        assert len({(p.prompt, p.seed) for p in pictures}) == 4
        assert sorted(p.order for p in pictures) == sorted([pair, pair, pair[::-1], pair[::-1]])
        assert all(p.prompt.index(f"<{p.order[0]}>") < p.prompt.index("next") for p in pictures)
        seeds.append({p.seed for p in pictures})
    assert all(not a & b for a, b in itertools.combinations(seeds, 2))


# Crops


def two_coloured() -> Image.Image:
    picture = Image.new("RGB", (128, 128), RED)
    picture.paste(BLUE, (64, 0, 128, 128))
    return picture


@pytest.mark.parametrize("way", crops.PADDINGS)
def test_a_padded_crop_is_a_square_with_the_whole_crop_in_its_middle(way):
    noise = np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    (square,) = crops.squares(Image.fromarray(noise), way)
    assert np.asarray(square).shape == (128, 128, 3)
    assert np.array_equal(np.asarray(square)[:, 32:96], noise)


def test_windows_are_squares_that_cover_the_whole_crop():
    noise = np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    top, middle, bottom = map(np.asarray, crops.squares(Image.fromarray(noise), crops.WINDOWS))
    assert np.array_equal(np.concatenate([top, bottom]), noise)
    assert np.array_equal(middle, noise[32:96])


@pytest.mark.parametrize("way", crops.WAYS)
def test_a_crop_knows_nothing_of_the_other_half(way):
    for half, colour in zip(crops.halves(two_coloured()), (RED, BLUE), strict=True):
        assert all((np.asarray(square) == colour).all() for square in crops.squares(half, way))


def test_the_border_colour_is_the_mean_of_the_crops_border():
    strip = Image.new("RGB", (10, 30), BLUE)
    strip.paste(RED, (1, 1, 9, 29))
    assert crops.padded(strip, "border colour").getpixel((0, 0)) == BLUE


# Figures

PAIRS = [("a", "b"), ("a", "c"), ("b", "c")]
LEFT_RIGHT = [order for pair in PAIRS for order in (pair, pair[::-1]) * 2]


def seen(orders) -> np.ndarray:
    """Cosines (crops, 3) of pictures in which exactly these concepts stand left and right."""
    return np.eye(3)[judging.labels_of(orders, "abc")[0]]


def judged(means: np.ndarray, threshold: float | None = None) -> dict:
    labels = judging.labels_of(LEFT_RIGHT, "abc")
    return judging.figures(means, labels, np.array([True, False, False]), 0, threshold)


def test_perfect_pictures_score_one():
    found = judged(seen(LEFT_RIGHT), 0.9)
    figure = found["own_concept_scores_higher"]
    assert figure == {
        "value": 1.0, "interval": [1.0, 1.0], "threshold": 0.9, "met": True, "of": 24,
    }  # fmt: skip
    assert found["both_regions_right"]["value"] == found["margin"]["value"] == 1


def test_swapped_sides_score_zero_but_one_under_the_best_assignment():
    found = judged(seen([order[::-1] for order in LEFT_RIGHT]), 0.9)
    figure = found["own_concept_scores_higher"]
    assert (figure["value"], figure["met"]) == (0.0, False)
    assert found["best_assignment"]["value"] == 1.0
    assert found["margin"]["value"] == -1


def test_one_concept_on_both_sides_scores_half_even_under_the_best_assignment():
    found = judged(seen([(first, first) for first, _ in LEFT_RIGHT]))
    assert found["own_concept_scores_higher"]["value"] == 0.5
    assert found["best_assignment"]["value"] == 0.5
    assert found["both_regions_right"]["value"] == 0


def test_shuffled_labels_score_about_half_even_for_perfect_pictures():
    pairs = plan.all_pairs([f"n{k:02}" for k in range(14)])
    names = [f"n{k:02}" for k in range(14)]
    labels = judging.labels_of([o for p in pairs for o in (p, p[::-1]) * 2], names)
    # A concept beside another's label is as near to one of the two as to the other.
    means = np.eye(14)[labels[0]] + 1e-6 * np.random.default_rng(1).normal(
        size=(len(labels[0]), 14)
    )
    found = judging.shuffled(means, labels, np.random.default_rng(0))
    assert found["value"] == pytest.approx(0.5, abs=0.01)
    assert 0 < found["standard_deviation"] < 0.03


def test_groups_are_those_of_the_categories():
    means = seen(LEFT_RIGHT)
    means[:8] = means[:8].reshape(4, 2, 3)[:, ::-1].reshape(8, 3)  # its sides exchanged
    found = judged(means)
    assert found["within_one_category"] == {"value": 0.0, "interval": [0.0, 0.0], "pairs": 1}
    assert found["across_categories"]["value"] == 1.0


def test_a_reference_that_is_left_out_does_not_count():
    crop = torch.tensor([[1.0, 0.0]])
    references = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8]])]
    assert judging.to_concepts(crop, references) == pytest.approx(np.array([[0.5, 0.6]]))
    left_out = judging.to_concepts(crop, references, np.array([[0, -1]]))
    assert left_out == pytest.approx(np.array([[0.0, 0.6]]))


def test_calibration_shows_each_reference_on_its_own_side():
    references = {"a": [Image.new("RGB", (99, 99), RED)], "b": [Image.new("RGB", (99, 99), BLUE)]}
    known = crops.calibration([("a", "b")], references, np.random.default_rng(0))
    assert [case.order for case in known] == [("a", "b"), ("b", "a")]
    for case in known:
        for half, name in zip(crops.halves(case.picture), case.order, strict=True):
            pixels, own = np.asarray(half).reshape(-1, 3), {"a": RED, "b": BLUE}[name]
            assert (pixels == own).all(1).mean() > 0.2
            assert not (pixels == {"a": BLUE, "b": RED}[name]).all(1).any()
