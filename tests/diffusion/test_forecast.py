"""Predictions of a merge on the pocket base, and that making one leaves no trace."""

import pytest
import torch

from sbora_diffusion.core.errors import BaseMismatch, ConflictError, NonFiniteError
from sbora_diffusion.core.prediction import ADDED, CALIBRATED
from sbora_diffusion.diffusion import calibrated
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig, generic_moments, own_moments
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept, strong_concepts

QUICK = CalibrateConfig(prompts=("a photo of {}",), generic=1, steps=1, gain=1.25)
NAMES = ("first", "second")


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory):
    return strong_concepts(pocket, tmp_path_factory.mktemp("strong"))


@pytest.fixture(autouse=True)
def base_is_given_back(pocket):
    before = snapshot(pocket)
    yield
    assert_untouched(pocket, before)


def weights(base) -> dict[str, torch.Tensor]:
    layers = target_layers(base.pipeline)
    return {name: layer.weight.detach().double().clone() for name, layer in layers.items()}


def folded(base, kind, *arguments, then=weights):
    """What `then` finds with concepts folded in; the base is restored."""
    merged = kind(base, *arguments)
    try:
        return then(base)
    finally:
        merged.restore()


def energy(delta: torch.Tensor, moment: torch.Tensor) -> float:
    return ((delta @ moment.double()) * delta).sum().item()


def test_predictions_are_those_of_the_weights_that_a_merge_writes(pocket, strong):
    pairs = [(strong["one"], 1.0), (strong["rows"], 0.8)]
    found = Calibrated(pocket, config=QUICK).forecast(pairs, NAMES)
    bare, generic = weights(pocket), generic_moments(pocket, QUICK, lambda _: None)
    merged = {
        CALIBRATED: folded(pocket, Calibrated, pairs, QUICK),
        ADDED: folded(pocket, Merged, pairs),
    }
    for p, (concept, weight) in enumerate(pairs):
        own = folded(pocket, Merged, [(concept, weight)])
        moments = folded(
            pocket,
            Merged,
            [(concept, weight * QUICK.gain)],
            then=lambda base, c=concept: own_moments(base, c, QUICK, lambda _: None),
        )
        for way, together in merged.items():
            one = found.ways[way]
            assert one.names == NAMES and set(one.layers) == set(bare)
            for number, layer in enumerate(one.layers):
                left = energy(together[layer] - own[layer], moments[layer])
                assert one.left[p, number].item() == pytest.approx(left, rel=1e-2)
                whole = energy(bare[layer], moments[layer])
                assert one.whole[p, number].item() == pytest.approx(whole, rel=1e-3)
                changed = energy(together[layer] - bare[layer], generic[layer])
                assert one.generic[number].item() == pytest.approx(changed, rel=1e-2)


def test_a_prediction_draws_what_is_new_and_the_merge_then_nothing(pocket, strong, monkeypatch):
    drawn, own = [], calibrated.own_moments

    def counted(base, concept, *rest):
        drawn.append(concept.meta.name)
        return own(base, concept, *rest)

    monkeypatch.setattr(calibrated, "own_moments", counted)
    one, two = (strong["one"], 1.0), (strong["two"], 1.0)
    reports = []
    held = Calibrated(pocket, [one], QUICK, on_step=lambda *report: reports.append(report))
    before = weights(pocket)
    found = held.forecast([one, two], NAMES)
    assert drawn == ["one", "two"] and reports == [(1, 2), (2, 2), (1, 1)]
    assert all(torch.equal(before[name], now) for name, now in weights(pocket).items())
    assert held.concepts == [one]
    held.switch([two, one])
    again = held.forecast([one, two], NAMES)
    held.restore()
    assert drawn == ["one", "two"]
    for way, first in found.ways.items():
        torch.testing.assert_close(first.left, again.ways[way].left, rtol=0, atol=0)
        torch.testing.assert_close(first.whole, again.ways[way].whole, rtol=0, atol=0)


def test_what_cannot_be_merged_is_refused_before_anything_is_drawn(pocket, strong, tmp_path):
    one, reports = (strong["one"], 1.0), []
    foreign = strong_concept(
        pocket, tmp_path, "alien", fingerprint={n: "0" * 48 for n in strong["one"].layers}
    )
    empty = Calibrated(pocket, config=QUICK, on_step=lambda *report: reports.append(report))
    for error, other in (
        (ConflictError, (strong["double"], 1.0)),
        (BaseMismatch, (foreign, 1.0)),
        (NonFiniteError, (strong["two"], 1e39)),
    ):
        with pytest.raises(error):
            empty.forecast([one, other], NAMES)
    assert reports == [] and not pocket.folded


def test_a_fault_while_drawing_leaves_the_base_clean(pocket, strong):
    with pytest.raises(NonFiniteError):
        Calibrated(pocket, config=QUICK).forecast([(strong["one"], 1e30)], ["one"])
    assert not pocket.folded
    layer = next(iter(target_layers(pocket.pipeline).values()))
    assert not layer._forward_pre_hooks


def test_watching_ends_with_its_block_even_after_an_error(pocket):
    layers = target_layers(pocket.pipeline)
    with pytest.raises(KeyError), watched(layers, lambda name, x: None):
        raise KeyError
    assert not any(layer._forward_pre_hooks for layer in layers.values())
