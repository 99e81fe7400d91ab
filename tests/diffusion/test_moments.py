"""What calibration measures on the pocket base, and what it makes of a set of concepts."""

import json

import pytest
import torch
from pydantic import ValidationError

from sbora_diffusion.core.calibration import calibrated_concepts
from sbora_diffusion.core.errors import BaseMismatch, ConflictError, NonFiniteError
from sbora_diffusion.diffusion import calibrated
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import (
    PADDING,
    CalibrateConfig,
    generic_moments,
    generic_steps,
    own_moments,
)
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.evaluate import PROMPTS
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept, strong_concepts

QUICK = CalibrateConfig(prompts=("a photo of {}", "{} in the rain"), generic=2, steps=1)
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
FAITHFUL = QUICK.model_copy(update={"generic_weight": 0.0, "gain": 1.0})
KEYS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


@pytest.fixture(autouse=True)
def base_is_given_back(pocket, original):
    yield
    assert_untouched(pocket, original)


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory):
    return strong_concepts(pocket, tmp_path_factory.mktemp("strong"))


@pytest.fixture
def measured(monkeypatch):
    """Names of the concepts that are drawn, None for the base alone."""
    names = []

    def counting(function, name):
        def call(base, *rest):
            names.append(name(rest))
            return function(base, *rest)

        return call

    own = counting(calibrated.own_moments, lambda rest: rest[0].meta.name)
    monkeypatch.setattr(calibrated, "own_moments", own)
    monkeypatch.setattr(
        calibrated, "generic_moments", counting(calibrated.generic_moments, lambda _: None)
    )
    return names


def weights(base) -> dict[str, torch.Tensor]:
    layers = target_layers(base.pipeline)
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def folded(base, kind, *arguments) -> dict[str, torch.Tensor]:
    """The layers' weights with concepts folded in; the base is restored."""
    merged = kind(base, *arguments)
    try:
        return weights(base)
    finally:
        merged.restore()


def inputs(base, prompt: str) -> dict[str, list[torch.Tensor]]:
    """What enters each layer while one picture is drawn, call by call."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name, x):
        seen.setdefault(name, []).append(x.detach().clone())

    with watched(target_layers(base.pipeline), keep):
        draw_latents(base, [prompt], [0], 1, guidance=4.0)
    return seen


def weighted_mean(x: torch.Tensor, words: int) -> torch.Tensor:
    """Mean of x xᵀ over (tokens, in), in which all after the first `words` count little."""
    counts = torch.full((len(x),), PADDING)
    counts[:words] = 1
    return torch.einsum("t,ti,tj->ij", counts, x, x) / counts.sum()


def test_moments_are_those_of_stored_inputs_with_little_weight_on_the_padding(pocket, strong):
    merged = Merged(pocket, [(strong["one"], 1.0)])
    config = QUICK.model_copy(update={"prompts": ("{} in the rain",)})
    try:
        found = own_moments(pocket, strong["one"], config, lambda _: None)
        seen = inputs(pocket, "<one> in the rain")
    finally:
        merged.restore()
    assert found.keys() == seen.keys()
    words = 2 + 2 + 3  # begin and end, two vectors, three words
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found[TEXT], weighted_mean(seen[TEXT][0][0], words), **close)
    torch.testing.assert_close(found[KEYS], weighted_mean(seen[KEYS][0][1], words), **close)
    for layer in found.keys() - {TEXT, KEYS}:
        if layer.startswith("unet") and not layer.endswith(("attn2.to_k", "attn2.to_v")):
            x = seen[layer][0][1]
            torch.testing.assert_close(found[layer], x.T @ x / len(x), **close)


def test_generic_moments_count_both_halves(pocket):
    (prompt,) = generic_prompts(1, 0)
    config = QUICK.model_copy(update={"generic": 1})
    found = generic_moments(pocket, config, lambda _: None)
    seen = inputs(pocket, prompt)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    x = seen[layer][0].flatten(0, 1)
    torch.testing.assert_close(found[layer], x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    assert len(seen[TEXT]) == 2, "the prompt, then the empty one"


def test_large_pictures_come_in_small_batches_which_count_the_same(pocket, monkeypatch):
    config = QUICK.model_copy(update={"generic": 5})
    together = generic_moments(pocket, config, lambda _: None)
    monkeypatch.setattr("sbora_diffusion.diffusion.moments.PIXELS", 3 * pocket.resolution**2 - 1)
    done = []
    apart = generic_moments(pocket, config, done.append)
    assert done == [1, 2, 3] and generic_steps(pocket, config) == 3, "two, two and one"
    for layer, moment in together.items():
        torch.testing.assert_close(apart[layer], moment, rtol=1e-3, atol=1e-4)


def test_generic_prompts_follow_from_their_seed_and_own_prompts_are_not_the_evaluation():
    prompts = generic_prompts(60, 0)
    assert prompts == generic_prompts(60, 0) and prompts[:9] == generic_prompts(9, 0)
    assert prompts != generic_prompts(60, 1) and len(set(prompts)) > 50
    assert not any("<" in prompt or "  " in prompt for prompt in prompts)
    scenes = {p.split("{}")[1].strip() for p in PROMPTS} | {"in a room", "in a meadow"}
    own = CalibrateConfig().prompts
    assert not any(p in PROMPTS or p.endswith(tuple(scenes)) for p in own)


def test_each_concept_hears_itself_better_than_after_plain_addition(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["rows"], 0.8)]
    plain = folded(pocket, Merged, pairs)
    fitted = folded(pocket, Calibrated, pairs, FAITHFUL)
    for concept, weight in pairs:
        alone = Merged(pocket, [(concept, weight)])
        own, seen = weights(pocket), inputs(pocket, f"a photo of <{concept.meta.name}>")
        alone.restore()
        share = [error(seen, fitted, own, n) / error(seen, plain, own, n) for n in seen]
        assert sum(share) < 0.6 * len(seen)
        assert sum(x < 1 for x in share) > 0.9 * len(seen)


def test_weights_are_raised_by_the_gain_and_silence_counts_for_each_concept(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["rows"], 0.8)]
    config = QUICK.model_copy(update={"generic_weight": 2.0, "gain": 1.25})
    louder = [(concept, 1.25 * weight) for concept, weight in pairs]
    generic, own = generic_moments(pocket, config, lambda _: None), {}
    for concept, weight in louder:
        alone = Merged(pocket, [(concept, weight)])
        own[concept.meta.digest] = own_moments(pocket, concept, config, lambda _: None)
        alone.restore()
    copies = calibrated_concepts(louder, own, generic, 2.0 * len(pairs), config.ridge)
    expected = folded(pocket, Merged, [(copy, 1.0) for copy in copies])
    found = folded(pocket, Calibrated, pairs, config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_generic_prompts_hear_less_than_after_plain_addition(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["rows"], 0.8)]
    bare, seen = weights(pocket), inputs(pocket, generic_prompts(1, 0)[0])
    plain, fitted = folded(pocket, Merged, pairs), folded(pocket, Calibrated, pairs, QUICK)
    share = [error(seen, fitted, bare, n) / error(seen, plain, bare, n) for n in seen]
    assert max(share) < 0.5


def error(seen, one, other, layer: str) -> float:
    """How far apart two weights' outputs are, in the conditional half."""
    return (seen[layer][0][-1] @ (one[layer] - other[layer]).T).norm().item()


def test_pictures_of_a_calibrated_set_are_nearer_to_each_concept_alone(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["two"], 1.0)]
    more = CalibrateConfig(prompts=CalibrateConfig().prompts[:4], generic=8, steps=2)

    def latents(kind, *arguments):
        merged = kind(pocket, *arguments)
        prompts = [f"a photo of <{c.meta.name}>" for c, _ in pairs]
        try:
            return draw_latents(pocket, prompts, [0, 1], 2)
        finally:
            merged.restore()

    plain, fitted = latents(Merged, pairs), latents(Calibrated, pairs, more)
    rows = [latents_of_one(pocket, pair, k) for k, pair in enumerate(pairs)]
    alone = torch.cat(rows)
    distance = [(x - alone).flatten(1).norm(dim=1) for x in (fitted, plain)]
    assert (distance[0] < 0.8 * distance[1]).all(), distance


def latents_of_one(base, pair, seed) -> torch.Tensor:
    merged = Merged(base, [pair])
    try:
        return draw_latents(base, [f"a photo of <{pair[0].meta.name}>"], [seed], 2)
    finally:
        merged.restore()


def test_the_order_does_not_matter_and_a_change_measures_only_what_is_new(pocket, strong, measured):
    one, two, rows = ((strong[name], 1.0) for name in ("one", "two", "rows"))
    reports = []
    held = Calibrated(pocket, [rows, one], QUICK, on_step=lambda *r: reports.append(r))
    assert reports == [(1, 3), (2, 3), (3, 3)]
    assert measured == ["rows", "one", None]
    held.add(two[0])
    assert measured == ["rows", "one", None, "two"] and reports[3:] == [(1, 1)]
    every = weights(pocket)
    assert [c.meta.digest for c, _ in held.concepts] == sorted(
        pair[0].meta.digest for pair in (one, two, rows)
    )
    held.remove("rows")
    pair = weights(pocket)
    held.restore()
    assert measured[4:] == [] and held.concepts == [] and not pocket.folded
    assert_same(folded(pocket, Calibrated, [two, one], QUICK), pair)
    assert_same(folded(pocket, Calibrated, [two, rows, one], QUICK), every)
    assert not torch.equal(every[KEYS], pair[KEYS])


def assert_same(one, other):
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_what_cannot_be_merged_is_refused_before_anything_is_drawn(
    pocket, strong, measured, tmp_path
):
    one = (strong["one"], 1.0)
    foreign = strong_concept(
        pocket, tmp_path, "alien", fingerprint={n: "0" * 48 for n in strong["one"].layers}
    )
    for error, other in ((ConflictError, strong["double"]), (BaseMismatch, foreign)):
        with pytest.raises(error):
            Calibrated(pocket, [one, (other, 1.0)], QUICK)
    with pytest.raises(NonFiniteError):
        Calibrated(pocket, [one, (strong["two"], 1e39)], QUICK)
    assert measured == []


def test_a_fault_while_drawing_keeps_the_set_as_it_was(pocket, strong):
    held = Calibrated(pocket, [(strong["one"], 1.0)], QUICK)
    before = snapshot(pocket)
    with pytest.raises(NonFiniteError):
        held.add(strong["two"], 1e30)
    assert_untouched(pocket, before)
    assert [concept.meta.name for concept, _ in held.concepts] == ["one"]
    held.restore()


def test_shared_indices_can_be_accepted(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["double"], 1.0)]
    fitted = folded(pocket, Calibrated, pairs, QUICK, True)
    assert all(weight.isfinite().all() for weight in fitted.values())


def test_the_record_names_the_originals_and_the_settings(pocket, strong, tmp_path):
    held = Calibrated(pocket, [(strong["two"], 0.5), (strong["one"], 1.0)], QUICK)
    held.save(tmp_path / "model")
    held.restore()
    record = json.loads((tmp_path / "model" / "sbora.json").read_text())
    assert CalibrateConfig(**record["calibration"]) == QUICK
    listed = {(c["name"], c["digest"], c["weight"]) for c in record["concepts"]}
    digest = {name: strong[name].meta.digest for name in ("one", "two")}
    assert listed == {("one", digest["one"], 1.0), ("two", digest["two"], 0.5)}


@pytest.mark.parametrize(
    "wrong", [{"prompts": ["a photo"]}, {"prompts": []}, {"ridge": 0}, {"guidance": 1}, {"step": 3}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        CalibrateConfig(**wrong)
