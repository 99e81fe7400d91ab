"""Drawing styles: what redrawing keeps, and how the styles differ."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from world.drawing_styles import DRAWING_STYLES, redraw

NAMES = (
    "pixel art",
    "watercolour",
    "pencil sketch",
    "oil painting",
    "black and white photo",
    "sepia photo",
    "mosaic",
    "neon",
    "comic",
)
MARGIN = 0.04  # mean absolute difference of two drawings of one picture


def scene(seed: int) -> Tensor:
    """A graded sky over a ground, with two overlapping discs, (3, 128, 128)."""
    generator = torch.Generator().manual_seed(seed)
    sky, ground, *discs = torch.rand(4, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    picture = torch.where(y < 70 + 8 * seed, sky * (0.6 + y / 200), ground)
    places = ((60, 40 + 20 * seed, 28), (40 + 15 * seed, 90 - 25 * seed, 20))
    for disc, (row, column, radius) in zip(discs, places, strict=True):
        picture = torch.where((y - row) ** 2 + (x - column) ** 2 < radius**2, disc, picture)
    return picture


def outlines(pictures: Tensor) -> Tensor:
    """Steepest channel's slope in blocks of 4 × 4, centred, of length 1: (B, 961)."""
    blocks = torch.nn.functional.avg_pool2d(pictures, 4)
    down, across = blocks.diff(dim=2)[..., 1:], blocks.diff(dim=3)[:, :, 1:]
    slopes = (down**2 + across**2).sqrt().amax(1).flatten(1)
    return torch.nn.functional.normalize(slopes - slopes.mean(1, keepdim=True), dim=1)


def drawn(pictures: Tensor, name: str, shift: tuple[int, int] = (0, 0)) -> Tensor:
    style = torch.full((len(pictures),), DRAWING_STYLES.index(name))
    return redraw(pictures, style, torch.tensor([shift] * len(pictures)))


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return torch.stack([scene(seed) for seed in range(3)])


@pytest.fixture(scope="module")
def drawings(scenes) -> dict[str, Tensor]:
    return {"unchanged": scenes, **{name: drawn(scenes, name) for name in NAMES}}


def test_the_styles_have_their_names_in_order():
    assert DRAWING_STYLES == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_extreme_pictures_stay_in_range(name):
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    extremes = torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise, noise.round()])
    result = drawn(extremes, name, shift=(5, 1000))
    assert result.shape == extremes.shape and result.dtype == torch.float32
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_bytes_and_leave_the_picture_alone(name, scenes):
    before, state = scenes.clone(), torch.get_rng_state()
    first = drawn(scenes, name, (3, 4))
    torch.manual_seed(99)
    assert torch.equal(first, drawn(scenes, name, (3, 4)))
    assert torch.equal(before, scenes)
    torch.set_rng_state(state)


def test_unchanged_rows_are_bit_identical(scenes):
    result = redraw(scenes, torch.tensor([-1, 4, -1]), torch.zeros(3, 2, dtype=torch.long))
    assert torch.equal(result[[0, 2]], scenes[[0, 2]])
    assert not torch.equal(result[1], scenes[1])


def test_an_empty_batch_stays_empty():
    empty = torch.zeros(0, 3, 128, 128)
    nothing = torch.zeros(0, dtype=torch.long)
    assert redraw(empty, nothing, torch.zeros(0, 2, dtype=torch.long)).shape == empty.shape


def test_a_style_beyond_the_last_is_refused(scenes):
    beyond = torch.full((3,), len(NAMES))
    with pytest.raises(AssertionError, match="DRAWING_STYLES"):
        redraw(scenes, beyond, torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.parametrize("pair", [*combinations(("unchanged", *NAMES), 2)], ids=" / ".join)
def test_every_style_differs_from_the_picture_and_from_every_other(pair, drawings):
    one, other = (drawings[name] for name in pair)
    assert (one - other).abs().mean((1, 2, 3)).min() > MARGIN


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_still_shows_which_picture_it_was(name, drawings):
    """Its outlines correlate best with those of its own picture."""
    known, found = outlines(drawings["unchanged"]), outlines(drawings[name])
    assert torch.equal((found @ known.T).argmax(1), torch.arange(3))


def test_pixel_art_has_blocks_of_four_and_few_levels(drawings):
    blocks = drawings["pixel art"].unflatten(3, (32, 4)).unflatten(2, (32, 4))
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))
    assert len(drawings["pixel art"].unique()) <= 6


def test_black_and_white_has_equal_channels_and_sepia_runs_from_red_to_blue(drawings):
    grey, sepia = drawings["black and white photo"], drawings["sepia photo"]
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    assert (sepia[:, 0] > sepia[:, 1]).all() and (sepia[:, 1] > sepia[:, 2]).all()


def test_a_mosaic_has_flat_tiles_and_darker_grout():
    tiles = drawn(torch.full((1, 3, 128, 128), 0.7), "mosaic")[0]
    tiles = tiles.unflatten(2, (16, 8)).unflatten(1, (16, 8))  # (3, 16, 8, 16, 8)
    inner = tiles[:, :, 2:6, :, 2:6]
    assert torch.equal(inner, inner[:, :, :1, :, :1].expand_as(inner))
    assert (tiles[:, :, 0, :, 0] < inner[:, :, 0, :, 0] - 0.1).all()
    assert len(inner[0].unique()) > 100


@pytest.mark.parametrize("name", ["watercolour", "pencil sketch", "oil painting", "comic"])
def test_shift_moves_the_texture_with_the_period_of_the_picture(name):
    plain = torch.full((1, 3, 128, 128), 0.3)
    inner = (..., slice(32, 96), slice(32, 96))
    still, moved = drawn(plain, name)[inner], drawn(plain, name, (3, 5))[inner]
    assert (still - moved).abs().max() > 0.01
    rolled = drawn(plain, name).roll((-3, -5), (2, 3))[inner]
    torch.testing.assert_close(moved, rolled, atol=1e-4, rtol=0)
    assert torch.equal(drawn(plain, name, (128, 256))[inner], still)


def test_a_mixed_batch_equals_one_picture_at_a_time(scenes):
    style = torch.tensor([8, -1, 0, 3, 7, 3, 5, 1, 6, 2, 4])
    shift = torch.arange(22).reshape(11, 2) * 17
    pictures = scenes[torch.arange(11) % 3]
    together = redraw(pictures, style, shift)
    alone = torch.cat([redraw(pictures[[k]], style[[k]], shift[[k]]) for k in range(11)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
