"""Regions where the base has Stable Diffusion 1.5's widths, and where it computes in bf16."""

import pytest
import torch

from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.regions import Box, Regions
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.diffusion.thin_sd15 import thin_sd15

WHOLE, LEFT, RIGHT = Box(0, 0, 1, 1), Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
HALVES = {"one": LEFT, "two": RIGHT}
PROMPT = "a photo of <one> next to <two> on grass"
SIZES = {"sd15": (32, 32), "pocket in bf16": (64, 64)}


@pytest.fixture(scope="module", params=list(SIZES))
def prepared(request, pocket, tmp_path_factory):
    """A base, an FA and an FB concept that were trained on it in fp32, and the pictures' size."""
    folder = tmp_path_factory.mktemp("strong")
    trained_on = pocket if "pocket" in request.param else thin_sd15(pocket)
    kinds = {"one": ("fa", 0), "two": ("fb", 0)}
    strong = {n: strong_concept(trained_on, folder, n, v, s) for n, (v, s) in kinds.items()}
    base = load_base("pocket", "cpu", "bf16") if trained_on is pocket else trained_on
    return base, strong, SIZES[request.param]


@pytest.fixture
def live(prepared):
    """Both concepts attached; afterwards the base and its processors must be as they were."""
    base, strong, _ = prepared
    before, processors = snapshot(base), base.pipeline.unet.attn_processors
    pipeline = ConceptPipeline(base)
    pipeline.switch([(concept, 1.0) for concept in strong.values()])
    yield pipeline
    pipeline.switch([])
    assert_untouched(base, before)
    assert base.pipeline.unet.attn_processors == processors


def one_step(base: Base, size: tuple[int, int], sampler=draw_latents, prompt: str = PROMPT):
    latents = sampler(base, [prompt], [3], 1, 4.0, size=size)
    assert latents.shape[2:] == (size[0] // 4, size[1] // 4) and latents.isfinite().all()
    return latents


def test_one_concept_in_the_whole_picture_is_the_ungated_result(prepared, live):
    base, _, size = prepared
    live.remove("two")
    gated = one_step(base, size, Regions(live, {"one": WHOLE}), "a <one> on grass")
    assert torch.equal(gated, one_step(base, size, prompt="a <one> on grass"))


def test_other_regions_or_none_give_another_picture(prepared, live):
    base, _, size = prepared
    halves = one_step(base, size, Regions(live, HALVES))
    swapped = one_step(base, size, Regions(live, {"one": RIGHT, "two": LEFT}))
    together = one_step(base, size)
    for other in (swapped, together):
        assert (halves - other).abs().max() > 0.05


def test_regions_derived_from_the_bases_own_attention_change_the_picture(prepared, live):
    base, _, size = prepared
    assert (one_step(base, size, Regions(live)) - one_step(base, size)).abs().max() > 0.05
