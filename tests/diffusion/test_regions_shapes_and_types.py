"""Regions where the base has Stable Diffusion 1.5's widths, where it computes in bf16, and where it
has two text encoders."""

import pytest
import torch

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.regions import Box, Regions, encoded_texts
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.diffusion.lora_examples import concept_for
from tests.diffusion.thin_families import thin_family
from tests.diffusion.thin_sd15 import thin_sd15

WHOLE, LEFT, RIGHT = Box(0, 0, 1, 1), Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
HALVES = {"one": LEFT, "two": RIGHT}
PROMPT = "a photo of <one> next to <two> on grass"
SIZES = {"sd15": (32, 32), "pocket in bf16": (64, 64), "sdxl": (32, 32)}


@pytest.fixture(scope="module", params=list(SIZES))
def prepared(request, pocket, tmp_path_factory):
    """A base, an FA and an FB concept that were trained on it in fp32, and the pictures' size."""
    if request.param == "sdxl":
        return *on_two_encoders(pocket), SIZES["sdxl"]
    folder = tmp_path_factory.mktemp("strong")
    trained_on = pocket if "pocket" in request.param else thin_sd15(pocket)
    kinds = {"one": ("fa", 0), "two": ("fb", 0)}
    strong = {n: strong_concept(trained_on, folder, n, v, s) for n, (v, s) in kinds.items()}
    base = load_base("pocket", "cpu", "bf16") if trained_on is pocket else trained_on
    return base, strong, SIZES[request.param]


def on_two_encoders(pocket) -> tuple[Base, dict[str, Concept]]:
    base = thin_family("sdxl", pocket)
    return base, {
        "one": concept_for(base.pipeline, "one", "sdxl"),
        "two": concept_for(base.pipeline, "two", "sdxl", variant="fb"),
    }


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
        assert_apart(halves, other)


def test_regions_derived_from_the_bases_own_attention_change_the_picture(prepared, live):
    base, _, size = prepared
    assert_apart(one_step(base, size, Regions(live)), one_step(base, size))


def assert_apart(one, other):
    """Where all latents are small, as with random weights and Euler's step, relative to them."""
    assert (one - other).abs().max() > 0.05 * min(1.0, other.abs().max())


@pytest.mark.parametrize("negative", ["", "ugly"])
def test_two_encoders_read_each_concepts_own_text_and_pool_the_whole(pocket, negative):
    """Stable Diffusion XL; without a negative prompt its unconditional half is told zeros."""
    base, concepts = on_two_encoders(pocket)
    live, told = ConceptPipeline(base), []
    live.switch([(concept, 1.0) for concept in concepts.values()])
    hook = base.denoiser.register_forward_pre_hook(
        lambda _module, _inputs, named: told.append(named), with_kwargs=True
    )
    Regions(live, HALVES)(base, [PROMPT], [0], 1, 4.0, negative, size=SIZES["sdxl"])
    hook.remove()
    states, added = told[0]["encoder_hidden_states"], told[0]["added_cond_kwargs"]
    order = ["", *live.order]
    whole = encoded(base, PROMPT, negative)
    assert torch.equal(added["text_embeds"], joined(whole, "pooled_prompt_embeds"))
    noun = concepts["one"].meta.tokens[0].initializer
    for name, own in zip(order, states.chunk(3, 1), strict=True):
        live.switch([(concepts[name], 1.0)] if name else [])
        word = f"<{name}>" if name else noun
        text = PROMPT.replace("<one>", word).replace("<two>", word)
        expected = joined(encoded(base, text, negative), "prompt_embeds")
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
        assert own[0].any() == bool(negative)
    live.switch([])


@torch.no_grad()
def encoded(base: Base, prompt: str, negative: str) -> dict[str, torch.Tensor]:
    return encoded_texts(base, [prompt], [negative], True)


def joined(texts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.cat([texts[f"negative_{name}"], texts[name]])
