"""Predictions of a merge against dense ones, and what must hold whatever the concepts are."""

import math
from dataclasses import replace

import pytest
import torch

from sbora_diffusion.core.calibration import calibrated_concepts
from sbora_diffusion.core.concept import Concept, sealed
from sbora_diffusion.core.functional import delta_weight, scaling
from sbora_diffusion.core.layers import kind, role
from sbora_diffusion.core.prediction import ADDED, CALIBRATED, forecast
from tests.core.concept_examples import SHAPES, make_base, make_concept

TOKENS, W_G, RIDGE = 60, 3.0, 1e-3
NAMES = ("one", "two", "three")
TEXT, KEYS, QUERY = sorted(SHAPES)[0], sorted(SHAPES)[1], sorted(SHAPES)[2]


def drawn(seed: int) -> dict[str, torch.Tensor]:
    """Layer → inputs (tokens, in), correlated and not centred."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {n: random(TOKENS, s[1]) @ random(s[1], s[1]) + 1 for n, s in SHAPES.items()}


def moments(inputs):
    return {layer: x.T @ x / len(x) for layer, x in inputs.items()}


@pytest.fixture
def trio():
    """FA, FB and an FA of another rank and scale, with weights; their inputs by digest."""
    pairs = [
        (make_concept("one", slot=0), 1.0),
        (make_concept("two", "fb", slot=1), 0.5),
        (make_concept("three", rank=2, slot=4, alpha=3.0), -0.7),
    ]
    pairs = [(sealed(concept), weight) for concept, weight in pairs]
    return pairs, {c.meta.digest: drawn(k) for k, (c, _) in enumerate(pairs)}


def predicted(pairs, inputs, names=NAMES, generic_weight=W_G, ridge=RIDGE):
    own = {digest: moments(x) for digest, x in inputs.items()}
    generic = moments(drawn(99))
    fitted = calibrated_concepts(pairs, own, generic, generic_weight, ridge)
    found = forecast(names[: len(pairs)], pairs, fitted, own, generic, make_base())
    return found, fitted


def dense(concept: Concept, weight: float, layer: str) -> torch.Tensor:
    if layer not in concept.layers:
        return torch.zeros(SHAPES[layer], dtype=torch.float64)
    meta, stored = concept.meta, concept.layers[layer]
    scale = scaling(meta.alpha, meta.rank, weight)
    return delta_weight(meta.variant, stored.factor.double(), stored.indices, SHAPES[layer], scale)


def mean_square(delta: torch.Tensor, x: torch.Tensor) -> float:
    return ((x @ delta.T).square().sum() / len(x)).item()


def without(concept: Concept, layer: str) -> Concept:
    return replace(concept, layers={n: s for n, s in concept.layers.items() if n != layer})


@pytest.mark.parametrize("missing", [None, KEYS])
def test_every_energy_is_that_of_dense_updates_on_the_inputs_themselves(trio, missing):
    pairs, inputs = trio
    if missing:
        pairs[0] = without(pairs[0][0], missing), pairs[0][1]
    found, fitted = predicted(pairs, inputs)
    ways = {ADDED: pairs, CALIBRATED: [(copy, 1.0) for copy in fitted]}
    for way, merged in ways.items():
        one = found.ways[way]
        assert one.layers == tuple(sorted(SHAPES)) and one.names == NAMES
        for k, layer in enumerate(one.layers):
            base = make_base()[layer].double()
            total = sum(dense(*pair, layer) for pair in merged)
            for p, pair in enumerate(pairs):
                x, itself = inputs[pair[0].meta.digest][layer], dense(*pair, layer)
                assert one.left[p, k].item() == pytest.approx(mean_square(total - itself, x))
                assert one.own[p, k].item() == pytest.approx(mean_square(itself, x), abs=1e-9)
                assert one.whole[p, k].item() == pytest.approx(mean_square(base, x))
                shared = ((x @ total.T) * (x @ itself.T)).sum() / len(x)
                assert one.shared[p, k].item() == pytest.approx(shared.item(), abs=1e-9)
            generic = drawn(99)[layer]
            assert one.generic[k].item() == pytest.approx(mean_square(total, generic))
            assert one.generic_whole[k].item() == pytest.approx(mean_square(base, generic))


def test_crosstalk_is_that_of_dense_updates(trio):
    pairs, inputs = trio
    norms = predicted(pairs, inputs)[0].crosstalk.norms
    for p, (own, _) in enumerate(pairs):
        for q, pair in enumerate(pairs):
            for k, layer in enumerate(sorted(SHAPES)):
                expected = mean_square(dense(*pair, layer), inputs[own.meta.digest][layer]) ** 0.5
                assert norms[p, q, k].item() == pytest.approx(expected)


def test_a_plain_sum_of_one_changes_nothing_and_calibration_alone_pays_for_its_silence(trio):
    pairs, inputs = trio
    for pair in pairs:
        found, _ = predicted([pair], inputs)
        assert found.ways[ADDED].rms().item() == pytest.approx(0, abs=1e-6)
        assert found.ways[CALIBRATED].rms().item() > 0.01
        free, _ = predicted([pair], {pair[0].meta.digest: inputs[pair[0].meta.digest]},
                            generic_weight=0.0, ridge=1e-13)  # fmt: skip
        assert free.ways[CALIBRATED].rms().item() == pytest.approx(0, abs=1e-5)


def test_loud_concepts_on_alike_prompts_disturb_less_calibrated_than_added():
    loud = [(sealed(make_concept(n, slot=k)), 5.0) for k, n in enumerate(NAMES)]
    inputs = {c.meta.digest: drawn(k) for k, (c, _) in enumerate(loud)}
    found, _ = predicted(loud, inputs)
    assert (found.ways[CALIBRATED].rms() < 0.9 * found.ways[ADDED].rms()).all()
    assert found.ways[CALIBRATED].of_generic() < 0.5 * found.ways[ADDED].of_generic()
    softer, _ = predicted([loud[0], *((c, 1.0) for c, _ in loud[1:])], inputs)
    assert softer.ways[ADDED].rms()[0] < found.ways[ADDED].rms()[0]


def test_the_order_of_the_concepts_changes_no_bit(trio):
    pairs, inputs = trio
    first, _ = predicted(pairs, inputs)
    second, _ = predicted(pairs[::-1], dict(reversed(inputs.items())), NAMES[::-1])
    for way in (CALIBRATED, ADDED):
        one, other = first.ways[way], second.ways[way]
        assert torch.equal(one.left, other.left.flip(0))
        assert torch.equal(one.generic, other.generic)
        for name, values in one.predictors().items():
            assert torch.equal(values, other.predictors()[name].flip(0)), name


def test_predictors_are_what_they_say(trio):
    one = predicted(*trio)[0].ways[ADDED]
    ratio = (one.left / one.own).sqrt()  # (3, 3)
    found = {name: values.tolist() for name, values in one.predictors().items()}
    unet = [one.layers.index(KEYS), one.layers.index(QUERY)]
    text = one.layers.index(TEXT)
    for p in range(3):
        rms = (ratio[p] ** 2).mean().sqrt().item()
        assert found["rms"][p] == pytest.approx(rms) == one.rms()[p].item()
        assert found["mean"][p] == pytest.approx(ratio[p].mean().item())
        energy = (one.left[p].sum() / one.own[p].sum()).sqrt().item()
        assert found["energy"][p] == pytest.approx(energy)
        whole = (one.left[p] / one.whole[p]).mean().sqrt().item()
        assert found["whole"][p] == pytest.approx(whole)
        assert found["unet"][p] == pytest.approx((ratio[p, unet] ** 2).mean().sqrt().item())
        assert found["text encoder"][p] == pytest.approx(ratio[p, text].item())
        lost = (1 - one.shared[p] / one.own[p]).mean().item()
        assert found["lost"][p] == pytest.approx(lost)
        assert found["foreign"][p] < rms
    assert set(one.grouped(kind)) <= found.keys()
    assert set(one.grouped(role)) == {role(layer) for layer in SHAPES}


def test_a_merge_that_only_weakens_a_concept_has_nothing_foreign(trio):
    one = predicted([trio[0][0]], trio[1])[0].ways[ADDED]
    halved = replace(one, left=one.own / 4, shared=one.own / 2)
    assert halved.predictors()["foreign"].item() == pytest.approx(0, abs=1e-7)
    assert halved.predictors()["lost"].item() == pytest.approx(0.5)
    assert halved.rms().item() == pytest.approx(0.5)


def test_a_concept_that_does_nothing_has_no_ratio_and_a_missing_layer_counts_for_none(trio):
    pairs, inputs = trio
    pairs[1] = pairs[1][0], 0.0
    pairs[0] = without(pairs[0][0], KEYS), 1.0
    one = predicted(pairs, inputs)[0].ways[ADDED]
    figures = one.predictors()
    assert math.isnan(figures["rms"][1]) and math.isnan(figures["energy"][1])
    assert figures["whole"].isfinite().all()
    number = one.layers.index(KEYS)
    assert one.own[0, number] == 0 and one.left[0, number] > 0
    assert one.ratios()[0].isnan().tolist() == [k == number for k in range(3)]
    assert math.isnan(one.grouped(kind)["cross-attention"][1])
