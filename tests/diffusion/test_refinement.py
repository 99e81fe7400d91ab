"""Refined merging: what it learns from, what it changes, what it leaves."""

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion import calibrated, graphs, refinement
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.drawing import RecordedUNet
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.predictions import (
    generic_predictions,
    joined,
    own_prediction_steps,
    own_predictions,
)
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concepts
from tests.diffusion.tape import Recorder
from tests.diffusion.thin_pocket import thin_pocket

FIT = {"prompts": ("a photo of {}",), "generic": 1, "steps": 1, "gain": 1.0}
QUICK = CalibrateConfig(**FIT, refine=3, refine_rows=4, refine_timesteps=1)


@pytest.fixture(scope="module")
def base(pocket):
    return thin_pocket(pocket)


@pytest.fixture(scope="module")
def original(base):
    return snapshot(base)


@pytest.fixture(autouse=True)
def base_is_given_back(base, original):
    yield
    assert_untouched(base, original)


@pytest.fixture(scope="module")
def strong(base, tmp_path_factory):
    return strong_concepts(base, tmp_path_factory.mktemp("strong"))


def weights(base) -> dict[str, torch.Tensor]:
    layers = target_layers(base.pipeline)
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def folded(base, pairs, config, **options) -> dict[str, torch.Tensor]:
    """The layers' weights with a refined set in them; the base is restored."""
    merged = Calibrated(base, pairs, config, **options)
    try:
        return weights(base)
    finally:
        merged.restore()


def alone(base, concept, config):
    merged = Merged(base, [(concept, 1.0)])
    try:
        return own_predictions(base, concept, config, lambda _: None)
    finally:
        merged.restore()


def error(base, pairs, config, heard) -> float:
    """Mean squared error of the merged model's predictions against those that were heard."""
    merged = Calibrated(base, pairs, config)
    try:
        states, _ = base.pipeline.encode_prompt(list(heard.texts), base.device, 1, False)
        with torch.no_grad():
            found = base.pipeline.unet(heard.noised, heard.timesteps, states).sample
        return (found - heard.predicted).square().mean().item()
    finally:
        merged.restore()


def test_predictions_are_those_of_drawing_with_the_concept_alone(base, strong):
    config = QUICK.model_copy(update={"prompts": ("{} in the rain",), "refine_timesteps": 2})
    done = []
    merged = Merged(base, [(strong["one"], 1.0)])
    try:
        heard = own_predictions(base, strong["one"], config, done.append)
        states, _ = base.pipeline.encode_prompt(["", "<one> in the rain"], "cpu", 1, False)
        with torch.no_grad():
            first = base.pipeline.unet(heard.noised[:2], heard.timesteps[:2], states).sample
        drawn = draw_latents(base, ["<one> in the rain"], [config.seed], 2, config.guidance)
        scheduler = base.pipeline.scheduler
        negative, positive = heard.predicted[2:].chunk(2)
        guided = negative + config.guidance * (positive - negative)
        last = scheduler.step(guided, heard.timesteps[2], heard.noised[3:]).prev_sample
    finally:
        merged.restore()
    assert heard.texts == ("", "<one> in the rain") * 2
    assert heard.timesteps.tolist() == [t for t in scheduler.timesteps.tolist() for _ in (0, 1)]
    torch.testing.assert_close(heard.predicted[:2], first, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last, drawn, rtol=1e-3, atol=1e-3)
    assert done == [1, 2] and own_prediction_steps(base, config) == 2


def test_generic_predictions_are_the_bare_bases(base):
    config = QUICK.model_copy(update={"generic": 9})
    heard = generic_predictions(base, config, lambda _: None)
    prompts = generic_prompts(9, config.seed)
    assert heard.texts == (*[""] * 8, *prompts[:8], "", prompts[8])
    assert all(len(part) == 18 for part in heard)


HALF = {"refine": 30, "refine_rate": 2e-3, "refine_mixed_precision": "bf16"}


@pytest.mark.parametrize("way,left", [({"refine": 60}, 0.75), (HALF, 0.85)], ids=["fp32", "bf16"])
def test_the_merged_model_comes_nearer_to_each_concept_alone_and_to_the_base(
    base, strong, way, left
):
    pairs = [(strong["one"], 1.0), (strong["rows"], 1.0)]
    config = QUICK.model_copy(update={"refine_rows": 6, "refine_timesteps": 2, **way})
    parts = [alone(base, concept, config) for concept, _ in pairs]
    parts.append(generic_predictions(base, config, lambda _: None))
    fit = config.model_copy(update={"refine": 0})
    heard = joined(parts)
    assert error(base, pairs, config, heard) < left * error(base, pairs, fit, heard)


def test_nothing_changes_but_what_the_concepts_own(base, strong):
    pairs = [(strong["one"], 1.0), (strong["rows"], 0.5)]
    bare, refined = weights(base), folded(base, pairs, QUICK)
    fitted = folded(base, pairs, QUICK.model_copy(update={"refine": 0}))
    for name, weight in refined.items():
        free = torch.ones_like(weight, dtype=torch.bool)
        free[:, strong["one"].layers[name].indices.long()] = False
        free[strong["rows"].layers[name].indices.long()] = False
        assert torch.equal(weight[free], bare[name][free])
        assert not torch.equal(weight, fitted[name])


def test_the_order_does_not_matter_and_a_change_draws_only_what_is_new(base, strong, monkeypatch):
    one, two, rows = ((strong[name], 1.0) for name in ("one", "two", "rows"))
    heard, reports = [], []

    def counting(base, concept, *rest):
        heard.append(concept.meta.name)
        return own_predictions(base, concept, *rest)

    monkeypatch.setattr(calibrated, "own_predictions", counting)
    held = Calibrated(base, [rows, one], QUICK, on_step=lambda *r: reports.append(r))
    assert reports == [(k, 3) for k in (1, 2, 3)] + [(k, 6) for k in range(1, 7)]
    held.add(two[0])
    assert heard == ["rows", "one", "two"] and reports[-1] == (4, 4)
    every = weights(base)
    held.remove("two")
    pair = weights(base)
    held.restore()
    for expected, order in ((every, [two, one, rows]), (pair, [one, rows])):
        found = folded(base, order, QUICK)
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_parts_of_a_step_give_what_the_whole_gives(base, strong, monkeypatch):
    pairs = [(strong["one"], 1.0), (strong["two"], 1.0)]
    config = QUICK.model_copy(update={"refine": 1, "refine_rows": 5})
    whole = folded(base, pairs, config)
    monkeypatch.setattr(refinement, "POSITIONS", 2 * 8 * 8)
    parts = folded(base, pairs, config)
    # Adam's first step is the rate for every entry, whose gradient's sign alone counts.
    close = [(whole[name] - parts[name]).abs().gt(1e-5).float().mean().item() for name in whole]
    assert max(close) < 0.02


def test_a_descent_that_diverges_keeps_the_set_as_it_was(base, strong):
    held = Calibrated(base, [(strong["one"], 1.0)], QUICK)
    before = snapshot(base)
    held.config = QUICK.model_copy(update={"refine_rate": 1e30})
    with pytest.raises(NonFiniteError, match="refinement"):
        held.add(strong["two"])
    assert_untouched(base, before)
    assert [concept.meta.name for concept, _ in held.concepts] == ["one"]
    held.restore()


def test_recorded_steps_give_what_the_plain_ones_give(base, strong, monkeypatch):
    pairs = [(strong[name], 1.0) for name in ("one", "rows")]
    plain, recorder = folded(base, pairs, QUICK), Recorder()
    monkeypatch.setattr(graphs, "CAPABLE", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "capture", recorder)
    base.recorded = RecordedUNet()
    found = folded(base, pairs, QUICK)
    assert recorder.played >= QUICK.refine
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-6)


def test_shared_indices_are_refined_too(base, strong):
    pairs = [(strong["one"], 1.0), (strong["double"], 1.0)]
    found = folded(base, pairs, QUICK, allow_overlap=True)
    assert all(weight.isfinite().all() for weight in found.values())
