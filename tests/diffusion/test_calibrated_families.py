"""Calibrated and refined merging on bases with several text encoders."""

from collections import Counter

import pytest
import torch

from sbora_diffusion.core.prediction import ADDED, CALIBRATED
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import PADDING, CalibrateConfig, generic_moments
from sbora_diffusion.diffusion.pipeline import draw_latents, hears_nothing
from sbora_diffusion.diffusion.predictions import generic_predictions, own_predictions
from sbora_diffusion.diffusion.refinement import _texts, silenced
from sbora_diffusion.diffusion.targets import adaptable, target_layers
from sbora_diffusion.diffusion.tokens import text_encoders
from tests.diffusion.lora_examples import concept_for, weights_of
from tests.diffusion.test_families import assert_untouched, parts
from tests.diffusion.thin_families import thin_family

QUICK = CalibrateConfig(
    prompts=("a photo of {}",), generic=1, steps=1, gain=1.0, generic_weight=0.0, refine_rows=4,
    refine_timesteps=2,
)  # fmt: skip
READS_TEXT = {
    "sdxl": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "sd3": "transformer.transformer_blocks.0.attn.add_k_proj",
}
READS_PICTURE = {
    "sdxl": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
    "sd3": "transformer.transformer_blocks.1.attn.to_k",
}
SECOND = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["sdxl", "sd3", "sd3 without T5"])
def base(request, pocket) -> Base:
    name, _, less = request.param.partition(" ")
    return thin_family(name, pocket, with_t5=not less)


@pytest.fixture(autouse=True)
def base_is_given_back(base):
    before = parts(base)
    yield
    assert_untouched(base, before)


@pytest.fixture(scope="module")
def pairs(base):
    made = [concept_for(base.pipeline, "one", base.family)]
    made.append(concept_for(base.pipeline, "two", base.family, slot=1))
    return [(made[0], 1.0), (made[1], 0.8)]


def drawn_inputs(base: Base, prompt: str) -> dict[str, torch.Tensor]:
    """What each layer reads first while the prompt is drawn as `sbora generate` does."""
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:  # what a hook returns would be read instead
        seen.setdefault(name, x.clone())

    with watched(target_layers(base.pipeline), see):
        draw_latents(base, [prompt], [QUICK.seed], QUICK.steps, QUICK.guidance)
    return seen


def test_moments_are_those_of_ordinary_drawing(base):
    """With what the unconditional half is told in it: zeros in Stable Diffusion XL."""
    (prompt,) = generic_prompts(1, QUICK.seed)
    seen, found = drawn_inputs(base, prompt), generic_moments(base, QUICK, lambda _: None)
    assert found.keys() == target_layers(base.pipeline).keys()
    pictures = seen[READS_PICTURE[base.family]].flatten(0, 1)
    expected = pictures.T @ pictures / len(pictures)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(found[READS_PICTURE[base.family]], expected, **close)
    own = weighted(seen[SECOND][:1], [words(base, "text_encoder_2", prompt)])
    if hears_nothing(base):
        torch.testing.assert_close(found[SECOND], own, **close)
    texts = seen[READS_TEXT[base.family]]
    counts = [words(base, "text_encoder", text) for text in ("", prompt)]
    if base.family == "sdxl":
        assert not texts[0].any()
        torch.testing.assert_close(found[READS_TEXT["sdxl"]], weighted(texts, counts), **close)


def words(base: Base, encoder: str, text: str) -> int:
    tokenizer = getattr(base.pipeline, encoder.replace("text_encoder", "tokenizer"))
    return len(tokenizer(text).input_ids)


def weighted(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Mean of x xᵀ over (B, tokens, in), in which all after a text's words count little."""
    weights = torch.full(x.shape[:2], PADDING)
    for row, count in enumerate(counts):
        weights[row, :count] = 1
    return torch.einsum("bt,bti,btj->ij", weights, x, x) / weights.sum()


def test_each_concept_hears_itself_better_than_after_plain_addition(base, pairs):
    found = Calibrated(base, config=QUICK).forecast(pairs, ["one", "two"])
    fitted, added = (found.ways[way].left for way in (CALIBRATED, ADDED))
    assert fitted.shape == added.shape == (2, len(target_layers(base.pipeline)))
    assert (fitted.sum(1) < 0.7 * added.sum(1)).all()
    parts = {name.partition(".")[0] for name in found.ways[ADDED].layers}
    assert parts == {base.kind.denoiser, "text_encoder", "text_encoder_2"}


def test_what_refinement_learns_from_is_what_the_model_predicts(base, pairs):
    concept, _ = pairs[0]
    merged = Merged(base, [(concept, 1.0)])
    try:
        heard = own_predictions(base, concept, QUICK, lambda _: None)
        assert heard.texts == ("", "a photo of <one>") * 2
        assert_predicted(base, heard)
    finally:
        merged.restore()
    assert_predicted(base, generic_predictions(base, QUICK, lambda _: None))


@torch.no_grad()
def assert_predicted(base: Base, heard) -> None:
    texts = _texts(base, heard.texts)
    ids = torch.stack([texts.ids(text) for text in heard.texts])
    told = texts.told(text_encoders(base.pipeline), ids, torch.float32)
    if hears_nothing(base):
        told = silenced(told, torch.tensor([bool(text) for text in heard.texts]))
    found = base.predicted(base.denoiser, heard.noised, heard.timesteps, told)
    assert (found - heard.predicted).abs().max() < 1e-3 * heard.predicted.abs().max()


def test_refinement_goes_on_from_the_fit(base, pairs):
    fit, refined = (
        after(base, pairs, QUICK.model_copy(update={"refine": steps})) for steps in (0, 2)
    )
    bare = weights_of(base.pipeline)
    changed = {n for n, w in refined.items() if not torch.equal(w, fit[n])}
    assert {name.partition(".")[0] for name in changed} >= {base.kind.denoiser, "text_encoder"}
    for name, weight in refined.items():
        touched, owned = (w != bare[name] for w in (weight, fit[name]))
        assert weight.isfinite().all() and not (touched & ~owned.any(0)).any()


def heard_by(base: Base, pairs, **settings) -> tuple[dict[str, torch.Tensor], Counter]:
    """The refined weights; how often layers computed in each dtype while there were gradients."""
    seen: Counter = Counter()

    def note(_layer, _inputs, output: torch.Tensor) -> None:
        seen[output.dtype] += torch.is_grad_enabled()

    layers = target_layers(base.pipeline).values()
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        return after(base, pairs, QUICK.model_copy(update={"refine": 2, **settings})), +seen
    finally:
        for hook in hooks:
            hook.remove()


def test_checkpointing_computes_again_and_refines_to_the_same(base, pairs):
    plain, once = heard_by(base, pairs)
    again, twice = heard_by(base, pairs, refine_gradient_checkpointing=True)
    assert once.keys() == twice.keys() == {torch.float32} and twice.total() > 1.5 * once.total()
    for name, weight in plain.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6)
    assert not any(
        getattr(m, "is_gradient_checkpointing", False) for _, m in adaptable(base.pipeline)
    )


def test_refinement_in_half_precision_ends_with_it(base, pairs):
    found, seen = heard_by(base, pairs, refine_mixed_precision="bf16")
    assert seen.keys() == {torch.bfloat16}
    assert all(
        weight.dtype == torch.float32 and weight.isfinite().all() for weight in found.values()
    )
    _, seen = heard_by(base, pairs)
    assert seen.keys() == {torch.float32}


def after(base: Base, pairs, config: CalibrateConfig) -> dict[str, torch.Tensor]:
    merged = Calibrated(base, pairs, config)
    try:
        return weights_of(base.pipeline)
    finally:
        merged.restore()
