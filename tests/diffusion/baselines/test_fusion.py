"""Gradient fusion, against least squares."""

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.baselines.adapted import Adapted, update_of
from sbora_diffusion.diffusion.baselines.custom_diffusion import READS_TEXT, token_ids
from sbora_diffusion.diffusion.baselines.edited import add_up
from sbora_diffusion.diffusion.baselines.fusion import (
    FusionConfig,
    SecondMoment,
    fused_update,
    fusing,
)
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.baselines.quick import random_concept

SHORT = FusionConfig(steps=2, text_iterations=40, spatial_iterations=5)
PROMPTS = ("photo of a <{}>", "<{}>")


def moment(x):
    found = SecondMoment(x.shape[-1], x.device)
    found.add(x)
    return found


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_second_moments_count_every_input():
    x = random(2, 3, 4)
    found = SecondMoment(4, x.device)
    for row in x:
        found.add(row)
    assert found.count == 6
    rows = x.reshape(6, 4)
    torch.testing.assert_close(found.products.float(), rows.T @ rows)


def test_the_fused_update_is_the_least_squares_of_all_concepts():
    inputs = [random(30, 6, seed=k) for k in (1, 2, 3)]
    updates = [random(4, 6, seed=10 + k) for k in (1, 2, 3)]
    got = fused_update(updates, [moment(x) for x in inputs], 500, FusionConfig())
    right = sum(u @ x.T @ x for u, x in zip(updates, inputs, strict=True))
    expected = right @ torch.linalg.inv(sum(x.T @ x for x in inputs))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_concept_alone_keeps_its_outputs_and_changes_no_more_than_they_need():
    x, update = random(3, 6), random(4, 6, seed=1)
    got = fused_update([update], [moment(x)], 500, FusionConfig())
    torch.testing.assert_close(x @ got.T, x @ update.T, rtol=1e-3, atol=1e-4)
    expected = torch.linalg.lstsq(x, x @ update.T, driver="gelsd").solution.T
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "layerwise"])
def pair(thin, request):
    return [random_concept(thin, name, layerwise=request.param) for name in ("one", "two")]


def test_layers_that_read_text_give_each_concept_its_own(thin, pair):
    """The text encoder's up to what any weight can, keys and values exactly."""
    layers = target_layers(thin.pipeline)
    own = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    text = {name: layer for name, layer in layers.items() if name.startswith("text_encoder.")}
    read = {}
    for concept in pair:
        with add_up(thin, [(concept, 1.0)]):
            seen = {name: [] for name in text}

            def see(name, x, seen=seen):
                seen[name].append(x.reshape(-1, x.shape[-1]))

            with watched(text, see):
                states_of(thin, concept)
            read[concept] = {name: torch.cat(rows) for name, rows in seen.items()}
    with fusing(SHORT)(thin, [(concept, 1.0) for concept in pair]):
        now = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        heard = {concept: states_of(thin, concept) for concept in pair}
    for name in text:
        inputs = [read[concept][name] for concept in pair]
        updates = [update_of(concept.layers[name], own[name]) for concept in pair]
        wanted = torch.cat([x @ u.T for x, u in zip(inputs, updates, strict=True)])
        best = torch.linalg.lstsq(torch.cat(inputs), wanted, driver="gelsd").solution.T
        inputs = torch.cat(inputs)
        left = [(inputs @ w.T - wanted).square().sum() for w in (best, now[name] - own[name])]
        assert left[1] <= 1.05 * left[0] + 0.05 * wanted.square().sum()
    for number, name in enumerate(sorted(n for n in layers if READS_TEXT.search(n))):
        for concept in pair:
            states = heard[concept]
            if concept.vectors.dim() == 3:
                states = states.chunk(concept.vectors.shape[1], -1)[number // 2]
            update = update_of(concept.layers[name], own[name])
            missing = states @ (now[name] - own[name] - update).T
            assert missing.norm() < 0.1 * (states @ update.T).norm()
    spatial = [name for name in layers if name not in text and not READS_TEXT.search(name)]
    assert all(not torch.equal(now[name], own[name]) for name in spatial)


@torch.no_grad()
def states_of(base, concept):
    """Text states at the placeholder and the end, of both prompts."""
    rows = []
    for prompt in PROMPTS:
        ids = token_ids(base, prompt.format(concept.meta.name))
        states = base.pipeline.text_encoder(torch.tensor([ids]))[0][0]
        rows.append(states[-1 - len(concept.vectors) :])  # it stands last in both
    return torch.cat(rows)


def test_a_broken_concept_leaves_the_base_as_it_was(thin):
    concept = random_concept(thin, "one")
    layers = {name: dict(parts) for name, parts in concept.layers.items()}
    layers[max(layers)]["up"] = layers[max(layers)]["up"] * float("inf")
    broken = Adapted(concept.meta, layers, concept.vectors)
    with pytest.raises(NonFiniteError, match="not finite"):
        fusing(SHORT)(thin, [(broken, 1.0)])
