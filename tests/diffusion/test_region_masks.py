"""Where regions are: boxes, soft masks, and maps of the base's own attention."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.prompts import with_nouns
from sbora_diffusion.diffusion.region_attention import level_size
from sbora_diffusion.diffusion.region_maps import AttentionMaps, attention_masks, competing
from sbora_diffusion.diffusion.regions import Box, box_masks, parse_region

NOUNS = {"<one>": "teddy bear", "<two>": "cap"}
TOKENS = [["<one>"], ["<two>"]]


@pytest.mark.parametrize(
    "corners",
    [
        (0, 0, 1.1, 1),
        (-0.1, 0, 1, 1),
        (0.5, 0, 0.5, 1),
        (0.6, 0, 0.5, 1),
        (0, 0.7, 1, 0.2),
        (0, 0, 1, math.nan),
        (0, -math.inf, 1, 1),
    ],
)
def test_a_box_that_is_empty_or_outside_the_picture_is_refused(corners):
    with pytest.raises(ConfigError, match="0 ≤ x0 < x1 ≤ 1"):
        Box(*corners)


def test_a_region_is_read_from_its_name_and_four_numbers():
    assert parse_region("fox=0,0.25,.5,1") == ("fox", Box(0, 0.25, 0.5, 1))
    for text in ("fox", "fox=", "fox=0,0,1", "fox=0,0,1,1,1", "fox=a,b,c,d"):
        with pytest.raises(ConfigError, match="NAME=x0,y0,x1,y1"):
            parse_region(text)


def test_the_whole_picture_is_all_ones_and_halves_make_one_whole():
    assert torch.equal(box_masks([Box(0, 0, 1, 1)], 9, 5), torch.ones(1, 1, 9, 5))
    left, right = box_masks([Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)], 32, 32)[0]
    torch.testing.assert_close(left + right, torch.ones(32, 32))
    assert left[:, :15].eq(1).all() and left[:, 17:].eq(0).all()
    assert (left.diff(dim=1) <= 0).all() and left[:, 15:17].gt(0).all()
    assert torch.equal(left, right.flip(1))


def test_a_box_covers_its_area_and_boxes_share_where_they_overlap():
    (mask,) = box_masks([Box(0.25, 0.5, 0.75, 1)], 64, 64)[0]
    assert mask.mean().item() == pytest.approx(0.25, abs=1e-3)
    assert mask[63, 32] == 1 and mask[16, 32] == 0 and mask[63, 8] == 0
    twice = box_masks([Box(0, 0, 1, 1), Box(0, 0, 0.5, 1)], 8, 8)[0]
    assert torch.equal(twice[:, :, 0], torch.full((2, 8), 0.5))
    assert torch.equal(twice[0, :, 7], torch.ones(8)) and (twice.sum(0) <= 1).all()


@pytest.mark.parametrize(("latents", "tokens", "size"), [
    ((32, 32), 1024, (32, 32)),
    ((32, 32), 64, (8, 8)),
    ((18, 34), 45, (5, 9)),
    ((64, 96), 384, (16, 24)),
])  # fmt: skip
def test_levels_halve_and_round_up_as_the_unet_does(latents, tokens, size):
    assert level_size(latents, tokens) == size


def test_attention_to_a_subjects_words_is_what_a_softmax_by_hand_gives():
    torch.manual_seed(0)  # layers are drawn from the global state
    attn = Attention(query_dim=6, cross_attention_dim=5, heads=2, dim_head=3)
    x, text = torch.randn(4, 16, 6), torch.randn(4, 7, 5)
    words = torch.zeros(2, 7, 1)
    words[0, 2:4], words[1, 6] = 1, 1
    maps = AttentionMaps(words)
    maps.add(attn, x, text)
    maps.add(attn, x, text)
    expected = torch.zeros(2, 16)
    for picture in range(2):
        row = 2 + picture  # the first two rows are the unconditional ones
        q, k = (attn.to_q(x[row]).view(16, 2, 3), attn.to_k(text[row]).view(7, 2, 3))
        for head in range(2):
            scores = (q[:, head] @ k[:, head].T / math.sqrt(3)).softmax(-1)
            expected[picture] += scores[:, words[picture, :, 0].bool()].sum(-1)
    torch.testing.assert_close(maps.average((8, 8))[:, 0].flatten(1), expected)


def test_each_subject_gets_the_place_that_attends_to_it_most_and_the_rest_is_background():
    ys, xs = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    blob = {x: torch.exp(-((xs - x) ** 2 + (ys - 8) ** 2) / 8) for x in (4, 11)}
    # The second subject also gets a little attention where the first is, on a higher level.
    maps = torch.stack([0.01 * blob[4], 0.5 + 0.2 * blob[11] + 0.05 * blob[4]])[None]
    first, second = competing(maps, (32, 32))[0]
    assert first.shape == (32, 32)
    assert first[16, 9] > 0.9 > 0.1 > second[16, 9]
    assert second[16, 23] > 0.9 > 0.1 > first[16, 23]
    assert max(first[0, 0], second[0, 0], first[31, 31]) < 0.1
    assert (first + second).max() <= 1 + 1e-6 and min(first.min(), second.min()) >= 0


def test_maps_without_any_structure_leave_all_to_the_background():
    assert competing(torch.full((1, 2, 16, 16), 0.3), (32, 32)).max() < 0.05


def test_masks_belong_to_each_picture_and_have_the_latents_size(pocket):
    prompts = [with_nouns(p, NOUNS) for p in ("a <one> next to a <two>", "a <two> and a <one>")]
    both = attention_masks(pocket, prompts, TOKENS, [3, 4], steps=2, guidance=4.0)
    assert both.shape == (2, 2, 32, 32)
    alone = attention_masks(pocket, prompts[1:], TOKENS, [4], steps=2, guidance=4.0)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > 0.1
    wide = attention_masks(pocket, prompts[:1], TOKENS, [3], 2, guidance=1.0, size=(72, 136))
    assert wide.shape == (1, 2, 18, 34)


def test_a_prompt_that_is_cut_off_before_a_subject_is_refused(pocket):
    long = with_nouns("a <one> " + "very " * 80 + "near a <two>", NOUNS)
    with pytest.raises(ConfigError, match="<two> is not read"):
        attention_masks(pocket, [long], TOKENS, [0], steps=1, guidance=1.0)
