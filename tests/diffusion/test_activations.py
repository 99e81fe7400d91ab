import pytest
import torch

from sbora_diffusion.core.errors import BaseMismatch, NonFiniteError
from sbora_diffusion.core.functional import delta_weight, scaling
from sbora_diffusion.diffusion import activations
from sbora_diffusion.diffusion.activations import ProbeConfig, measure_crosstalk, watched
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

QUICK = ProbeConfig(prompts=("a photo of {}", "a drawing of {} in space"), steps=1)
NAMES = ("fox", "owl")


@pytest.fixture(scope="module")
def concepts(pocket, tmp_path_factory):
    """An FA concept, and an FB concept with a weight."""
    folder = tmp_path_factory.mktemp("concepts")
    fox = strong_concept(pocket, folder, "fox", "fa", slot=1)
    return [(fox, 1.0), (strong_concept(pocket, folder, "owl", "fb", slot=2), 0.5)]


@pytest.fixture(scope="module")
def measured(pocket, concepts):
    return measure_crosstalk(pocket, concepts, NAMES, QUICK)


def seen_inputs(base, concept, weight) -> dict[str, torch.Tensor]:
    """Everything that enters each layer while one concept's prompts are drawn, kept whole."""
    seen: dict[str, list[torch.Tensor]] = {}
    pipeline = ConceptPipeline(base)
    pipeline.add(concept, weight)
    prompts = [prompt.format(f"<{concept.meta.name}>") for prompt in QUICK.prompts]

    def keep(name, x):
        seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

    with watched(target_layers(base.pipeline), keep):
        draw_latents(base, prompts, [0, 1], 1, guidance=1.0)
    pipeline.remove(concept.meta.name)
    return {name: torch.cat(portions) for name, portions in seen.items()}


def test_crosstalk_equals_that_of_dense_updates_on_stored_activations(pocket, concepts, measured):
    shapes = {name: layer.weight.shape for name, layer in target_layers(pocket.pipeline).items()}
    assert set(measured.layers) == set(shapes)
    for p, (own, weight) in enumerate(concepts):
        inputs = seen_inputs(pocket, own, weight)
        for q, (other, λ) in enumerate(concepts):
            scale = scaling(other.meta.alpha, other.meta.rank, λ)
            for number, layer in enumerate(measured.layers):
                stored = other.layers[layer]
                delta = delta_weight(
                    other.meta.variant, stored.factor, stored.indices, tuple(shapes[layer]), scale
                )
                expected = (inputs[layer] @ delta.T).double().norm().item()
                assert measured.norms[p, q, number].item() == pytest.approx(expected, rel=1e-4)


def test_another_weight_scales_one_disturber_and_changes_nothing_else(
    pocket, concepts, measured, monkeypatch
):
    monkeypatch.setattr(activations, "BATCH", 1)
    (fox, _), (owl, _) = concepts
    before, reports = snapshot(pocket), []
    louder = measure_crosstalk(
        pocket, [(fox, 1.0), (owl, 1.0)], NAMES, QUICK, lambda *report: reports.append(report)
    )
    assert_untouched(pocket, before)
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)], "a step of each of two batches, twice"
    close = {"rtol": 1e-4, "atol": 0}  # batches of other sizes round otherwise
    torch.testing.assert_close(louder.norms[0, 1], 2 * measured.norms[0, 1], **close)
    torch.testing.assert_close(louder.norms[0, 0], measured.norms[0, 0], **close)


def test_the_same_seed_gives_the_same_figures_and_another_seed_does_not(pocket, concepts, measured):
    def norms(seed):
        probe = QUICK.model_copy(update={"seed": seed})
        return measure_crosstalk(pocket, concepts[:1], NAMES[:1], probe).norms[0, 0]

    assert torch.equal(norms(0), measured.norms[0, 0])
    assert not torch.equal(norms(4), measured.norms[0, 0])


def test_a_concept_of_another_base_is_refused_before_anything_runs(pocket, concepts):
    fox, owl = concepts[0][0], concepts[1][0]
    digests = {**owl.meta.fingerprint, min(owl.layers): "0" * 48}
    meta = owl.meta.model_copy(update={"fingerprint": digests})
    foreign = type(owl)(meta, owl.layers, owl.embeddings)
    before, reports = snapshot(pocket), []
    with pytest.raises(BaseMismatch):
        measure_crosstalk(
            pocket, [(fox, 1.0), (foreign, 1.0)], NAMES, QUICK, lambda *r: reports.append(r)
        )
    assert reports == []
    assert_untouched(pocket, before)


def test_a_fault_while_drawing_leaves_the_base_clean(pocket, concepts):
    before = snapshot(pocket)
    (fox, _), _ = concepts
    with pytest.raises(NonFiniteError):
        measure_crosstalk(pocket, [(fox, 1e30)], ("fox",), QUICK)
    assert_untouched(pocket, before)
    layer = next(iter(target_layers(pocket.pipeline).values()))
    assert not layer._forward_pre_hooks
