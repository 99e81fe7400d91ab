"""Concepts kept to their regions: what is exact, what is confined, and that nothing is left."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.tuner import SboraLinear
from sbora_diffusion.diffusion.adapters import adapter_name, gated
from sbora_diffusion.diffusion.bases import POCKET
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, decode, draw_latents
from sbora_diffusion.diffusion.prompts import with_nouns
from sbora_diffusion.diffusion.region_attention import RegionGate, region_attention
from sbora_diffusion.diffusion.region_maps import attention_masks
from sbora_diffusion.diffusion.regions import Box, Regions
from sbora_diffusion.diffusion.tokens import word_vectors
from sbora_diffusion.evaluate import read_pictures
from sbora_diffusion.evaluation.features import ClipFeatures
from sbora_diffusion.evaluation.metrics import image_alignment
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

WHOLE, LEFT, RIGHT = Box(0, 0, 1, 1), Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
HALVES = {"one": LEFT, "two": RIGHT}
PROMPT = "a photo of <one> next to <two> on grass"
SMALL = (64, 64)  # pixels; latents of 16×16, attention at 8×8 and 4×4
CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory) -> dict[str, Concept]:
    folder = tmp_path_factory.mktemp("strong")
    kinds = {"one": ("fa", 0), "two": ("fb", 0)}
    return {n: strong_concept(pocket, folder, n, v, s) for n, (v, s) in kinds.items()}


@pytest.fixture
def live(pocket):
    """A pipeline of concepts; afterwards the base and its processors must be as they were."""
    before, processors = snapshot(pocket), pocket.pipeline.unet.attn_processors
    concepts = ConceptPipeline(pocket)
    yield concepts
    concepts.switch([])
    assert_untouched(pocket, before)
    assert pocket.pipeline.unet.attn_processors == processors


@pytest.fixture
def pair(live, strong):
    live.switch([(concept, 1.0) for concept in strong.values()])
    return live


def regional(
    live, boxes, prompts=(PROMPT,), seeds=(0,), steps=2, guidance=4.0, size=SMALL, **options
):
    sampler = Regions(live, boxes)
    return sampler(live.base, prompts, seeds, steps, guidance, size=size, **options)


def ungated(live, *prompts, seeds=(0,), steps=2, guidance=4.0, size=SMALL, **options):
    return draw_latents(live.base, prompts, seeds, steps, guidance, size=size, **options)


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_one_concept_in_the_whole_picture_is_the_ungated_result(live, strong, name, guidance):
    live.switch([(strong[name], 0.8)])
    prompts = [f"a <{name}> on grass", f"<{name.upper()}> in space"]
    options = {"seeds": [1, 2], "guidance": guidance, "negative_prompt": "ugly", "size": None}
    gates = regional(live, {name: WHOLE}, prompts, **options)
    assert torch.equal(gates, ungated(live, *prompts, **options))


def test_the_order_of_concepts_and_boxes_changes_no_byte(live, strong):
    results = []
    for names in (["one", "two"], ["two", "one"]):
        live.switch([])
        live.switch([(strong[name], 1.0) for name in names])
        results.append(regional(live, {name: HALVES[name] for name in names}))
    assert torch.equal(*results)


def test_silent_concepts_are_the_base_with_class_nouns(live, strong):
    vectors = word_vectors(live.base.pipeline, "toy")
    silent = [
        (dataclasses.replace(c, embeddings={f"text_encoder.<{n}>": vectors}), 0.0)
        for n, c in strong.items()
    ]
    live.switch(silent)
    result = regional(live, {"one": Box(0.1, 0.2, 0.6, 1), "two": Box(0.5, 0, 0.9, 0.7)})
    base = ungated(live, PROMPT.replace("<one>", "toy").replace("<two>", "toy"))
    torch.testing.assert_close(result, base, rtol=0, atol=1e-5)
    live.set_weight("one", 1.0)
    assert (regional(live, HALVES) - base).abs().max() > 0.1


@pytest.mark.parametrize("swapped", [False, True])
def test_each_concept_shows_in_its_own_region_in_the_judges_eyes(live, swapped):
    names = ["trex", "plushbear"][:: -1 if swapped else 1]
    examples = {n: read_concept(POCKET / "examples" / f"{n}.safetensors") for n in names}
    live.switch([(concept, 1.0) for concept in examples.values()])
    prompt = f"a photo of <{names[0]}> next to <{names[1]}> on the beach"
    boxes = dict(zip(names, (LEFT, RIGHT), strict=True))
    latents = regional(live, boxes, [prompt], steps=4, size=None)
    (picture,) = decode(live.base, latents)
    crops = [picture.crop((side, 32, side + 64, 96)) for side in (0, 64)]
    seen = ClipFeatures.load().images(crops)
    for k, name in enumerate(names):
        likeness = image_alignment(seen, references(name))
        assert likeness[k] > likeness[1 - k] + 0.1, (name, likeness)


def references(name: str) -> torch.Tensor:
    folder = Path(__file__).parents[2] / "concepts" / name
    return ClipFeatures.load().images(read_pictures(folder))


def test_self_attention_updates_are_each_token_times_its_mask(pair, strong):
    masks = torch.rand(2, 2, 16, 16) / 2
    masks[:, 0, :, :8], masks[:, 1, :, :8] = 1, 0
    gate = RegionGate(["one", "two"], masks)
    layer = pair.base.pipeline.unet.get_submodule(CROSS.replace("attn2", "attn1") + ".to_q")
    assert isinstance(layer, SboraLinear)
    x = torch.randn(4, 256, 160)  # two pictures, unconditional rows first
    with gated(pair.base.pipeline, gate), torch.no_grad():
        y = layer(x)
    expected = F.linear(x, layer.base_layer.weight)
    for k, name in enumerate(("one", "two")):
        update = F.linear(x, layer.get_delta_weight(adapter_name(name)))
        expected += masks.flatten(2)[:, k].repeat(2, 1)[..., None] * update
    torch.testing.assert_close(y, expected)
    pair.remove("two")
    with torch.no_grad():  # where "one" has all and "two" nothing, nothing tells them from "one"
        alone = layer(x)
    inside = torch.arange(256).view(16, 16)[:, :8].flatten()
    assert torch.equal(y[:, inside], alone[:, inside])


def test_cross_attention_is_each_concepts_own_blended_by_the_masks(live, strong):
    unet = live.base.pipeline.unet
    masks = torch.rand(1, 2, 32, 32) / 2
    gate = RegionGate(["one", "two"], masks)
    x, texts = torch.randn(2, 64, 160), torch.randn(3, 2, 77, 192)
    level = F.avg_pool2d(masks, 4).flatten(2)[0]
    shares = [1 - level.sum(0), *level]
    expected = 0
    for share, text, names in zip(shares, texts, ([], ["one"], ["two"]), strict=True):
        live.switch([(strong[name], 1.0) for name in names])
        with torch.no_grad():
            expected += share[:, None] * unet.get_submodule(CROSS)(x, text)
    live.switch([(concept, 1.0) for concept in strong.values()])
    with region_attention(live.base.pipeline, gate), torch.no_grad():
        blended = unet.get_submodule(CROSS)(x, torch.cat(list(texts), 1))
    torch.testing.assert_close(blended, expected)


def test_each_text_is_encoded_with_its_own_concept_alone(live, strong):
    live.switch([(concept, 1.0) for concept in strong.values()])
    seen = []
    unet = live.base.pipeline.unet
    hook = unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    regional(live, HALVES, steps=1, negative_prompt="<two>")
    hook.remove()
    texts = dict(zip(["", *live.order], seen[0].chunk(3, 1), strict=True))
    words = {"": ("toy", "toy"), "one": ("<one>", "toy"), "two": ("<two>", "<two>")}
    for name, (subject, negative) in words.items():
        live.switch([(strong[name], 1.0)] if name else [])
        prompt = PROMPT.replace("<one>", subject).replace("<two>", subject)
        with torch.no_grad():
            encoded = live.base.pipeline.encode_prompt([prompt], "cpu", 1, True, [negative])
        torch.testing.assert_close(texts[name], torch.cat(encoded[::-1]), rtol=0, atol=1e-5)


def test_regions_are_derived_from_the_frozen_base_whatever_is_attached(pair):
    prompt = with_nouns(PROMPT, {"<one>": "teddy bear", "<two>": "cap"})
    arguments = (pair.base, [prompt], [["<one>"], ["<two>"]], [0], 1, 1.0, "", SMALL)
    attached = attention_masks(*arguments)
    pair.switch([])
    assert torch.equal(attention_masks(*arguments), attached)


@pytest.mark.parametrize("boxes", [HALVES, None])
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(pair, boxes):
    prompts, seeds = [PROMPT, "a <two> and a <one>"], [3, 4]
    both = regional(pair, boxes, prompts, seeds)
    for k in range(2):
        alone = regional(pair, boxes, prompts[k : k + 1], seeds[k : k + 1])
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=2e-2 if not boxes else 1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("boxes", [HALVES, None])
@pytest.mark.parametrize("size", [(64, 128), (72, 136)])
def test_pictures_may_have_any_size_that_the_autoencoder_can_halve(pair, boxes, size):
    latents = regional(pair, boxes, steps=1, guidance=1.0, size=size)
    assert latents.shape == (1, 4, size[0] // 4, size[1] // 4) and latents.isfinite().all()


@pytest.mark.parametrize("boxes", [HALVES, None])
def test_processors_and_layers_are_as_before_even_after_an_exception(pair, boxes):
    unet = pair.base.pipeline.unet
    before, plain = unet.attn_processors, ungated(pair, PROMPT, steps=1)
    layers = [module for module in unet.modules() if isinstance(module, SboraLinear)]

    class Stop(Exception):
        pass

    def stop(_done):
        assert all(layer.gate for layer in layers)
        assert all(unet.attn_processors[name] is not before[name] for name in before)
        raise Stop

    for raising in (True, False):
        with ExitStack() as stack:
            if raising:
                stack.enter_context(pytest.raises(Stop))
            regional(pair, boxes, steps=1, on_step=stop if raising else None)
        assert all(unet.attn_processors[name] is before[name] for name in before)
        assert not any(layer.gate for layer in layers)
        assert torch.equal(ungated(pair, PROMPT, steps=1), plain)


def test_regions_go_through_generate_with_progress_and_change_the_picture(pair):
    calls = []
    options = {"steps": 2, "guidance": 1.0, "on_step": lambda *call: calls.append(call)}
    (picture,) = pair.generate(PROMPT, sampler=Regions(pair, HALVES), **options)
    assert picture.size == (128, 128) and calls == [(1, 2), (2, 2)]
    assert picture.tobytes() != pair.generate(PROMPT, **options)[0].tobytes()


def test_regions_that_do_not_fit_the_concepts_are_refused(pair):
    with pytest.raises(ConfigError, match=r"region 'fox' is not .* active are \['one', 'two'\]"):
        Regions(pair, {**HALVES, "fox": WHOLE})
    with pytest.raises(ConfigError, match="concept 'two' has no region"):
        Regions(pair, {"one": WHOLE})
    with pytest.raises(ConfigError, match=r"'two' has a region, .* does not mention <two>"):
        regional(pair, HALVES, prompts=["a <one> on grass"])
