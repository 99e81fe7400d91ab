"""The closed form against dense least squares, and what it must leave alone."""

import pytest
import torch

from sbora_diffusion.core.calibration import (
    Moments,
    calibrated_concepts,
    calibrated_factors,
    portion,
)
from sbora_diffusion.core.concept import Concept, LayerFactor, sealed
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.shares import concept_updates
from sbora_diffusion.core.updates import Update
from tests.core.concept_examples import SHAPES, make_concept

OUT, IN, TOKENS = 7, 10, 40
W_G, RIDGE = 3.0, 1e-3
KINDS = {
    "FA": [("fa", [1, 4], 1.0), ("fa", [0, 7], 1.0)],
    "FB": [("fb", [1, 4], 1.0), ("fb", [0, 6], 1.0)],
    "mixed": [("fa", [1, 4], 1.0), ("fb", [0, 6], 1.0), ("fa", [8, 9], 1.0)],
    "unequal ranks": [("fa", [5], 1.0), ("fa", [0, 1, 7], 1.0), ("fb", [2, 3, 5], 1.0)],
    "weights": [("fa", [1, 4], 0.5), ("fb", [0, 6], -1.5), ("fa", [8, 9], 0.0)],
    "unsorted indices": [("fa", [4, 1], 1.0), ("fb", [6, 0], 1.0)],
    "shared columns": [("fa", [1, 4], 1.0), ("fa", [4, 5], 0.7)],
    "shared rows": [("fb", [1, 4], 1.0), ("fb", [4, 5], 0.7), ("fa", [3], 1.0)],
}


def random_layer(kinds):
    """Updates with keys "a", "b" …, their activations (tokens, in), and generic ones."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    updates, own = [], {}
    for key, (variant, indices, scale) in zip("abcd", kinds, strict=False):
        shape = (OUT, len(indices)) if variant == "fa" else (len(indices), IN)
        updates.append(Update(key, variant, torch.tensor(indices), draw(*shape), scale))
        own[key] = draw(TOKENS, IN) @ draw(IN, IN)
    return updates, own, draw(TOKENS, IN) @ draw(IN, IN)


def moments_of(own, generic):
    return {key: x.T @ x / len(x) for key, x in own.items()}, generic.T @ generic / len(generic)


def dense(update, factor=None, scale=None) -> torch.Tensor:
    factor = update.factor if factor is None else factor
    scale = update.scale if scale is None else scale
    return delta_weight(update.variant, factor, update.indices, (OUT, IN), scale)


def by_least_squares(updates, own, generic) -> torch.Tensor:
    """ΔW (out, in), row by row over the entries that may differ from zero."""
    allowed = torch.zeros(OUT, IN, dtype=torch.bool)
    for update in updates:
        allowed.index_fill_(update.dim, update.indices, True)
    size = (RIDGE * (generic.square().mean(0).mean())) ** 0.5
    wanted = {key: torch.zeros(OUT, IN, dtype=torch.float64) for key in own}
    for update in updates:
        wanted[update.key] = dense(update)
    seen = [x / len(x) ** 0.5 for x in own.values()]
    rows = [*seen, generic * (W_G / len(generic)) ** 0.5, size * torch.eye(IN)]
    result = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        targets = [x @ wanted[key][i] for key, x in zip(own, seen, strict=True)]
        goal = torch.cat([*targets, torch.zeros(len(generic) + IN, dtype=torch.float64)])
        free = allowed[i]
        if free.any():
            matrix = torch.cat(rows)[:, free]
            result[i, free] = torch.linalg.lstsq(matrix, goal[:, None]).solution[:, 0]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_factors_add_up_to_the_constrained_least_squares_solution(kind):
    updates, own, generic = random_layer(KINDS[kind])
    factors = calibrated_factors(updates, *moments_of(own, generic), W_G, RIDGE)
    total = sum(dense(update, factors[update.key], 1.0) for update in updates)
    torch.testing.assert_close(total, by_least_squares(updates, own, generic))
    for update in updates:
        assert factors[update.key].shape == update.factor.shape


def test_a_concept_that_does_not_adapt_the_layer_is_to_hear_nothing_there():
    updates, own, generic = random_layer(KINDS["mixed"])
    factors = calibrated_factors(updates[:2], *moments_of(own, generic), W_G, RIDGE)
    total = sum(dense(update, factors[update.key], 1.0) for update in updates[:2])
    torch.testing.assert_close(total, by_least_squares(updates[:2], own, generic))
    alone = {key: own[key] for key in "ab"}
    assert not torch.allclose(total, by_least_squares(updates[:2], alone, generic))


@pytest.mark.parametrize("kind", ["fa", "fb"])
def test_one_concept_without_generic_prompts_and_penalty_keeps_its_factor(kind):
    updates, own, generic = random_layer([(kind, [1, 4], 0.8)])
    factors = calibrated_factors(updates, *moments_of(own, generic), 0.0, 1e-14)
    torch.testing.assert_close(factors["a"], 0.8 * updates[0].factor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kinds", [("fa", "fa"), ("fb", "fb")])
def test_concepts_with_orthogonal_activations_keep_their_factors(kinds):
    updates, own, generic = random_layer([(kinds[0], [1, 4], 1.0), (kinds[1], [5, 6], 1.0)])
    own["a"][:, 5:] = 0
    own["b"][:, :5] = 0
    if kinds[0] == "fb":  # what an update reads outside its own activations is left open
        updates[0].factor[:, 5:] = 0
        updates[1].factor[:, :5] = 0
    factors = calibrated_factors(updates, *moments_of(own, generic), 0.0, 1e-13)
    for update in updates:
        torch.testing.assert_close(factors[update.key], update.factor, rtol=1e-6, atol=1e-8)


def test_moments_that_leave_the_solution_open_are_refused():
    updates, own, generic = random_layer(KINDS["FB"])
    nothing = {key: torch.zeros(IN, IN) for key in own}
    with pytest.raises(NonFiniteError, match="ridge"):
        calibrated_factors(updates, nothing, torch.zeros(IN, IN), W_G, RIDGE)
    broken = {key: torch.full((IN, IN), torch.nan) for key in own}
    with pytest.raises(NonFiniteError, match="no finite solution"):
        calibrated_factors(updates, broken, generic.T @ generic, W_G, RIDGE)


def test_portions_add_up_to_the_weighted_mean_of_all():
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(3))
    weights[0, 0] = 0
    moments = Moments()
    moments.add("weighted", portion(x[:1], weights[:1]))
    moments.add("weighted", portion(x[1:], weights[1:]))
    moments.add("plain", portion(x))
    found = moments.means()
    expected = torch.einsum("bt,bti,btj->ij", weights, x, x) / weights.sum()
    torch.testing.assert_close(found["weighted"], expected)
    torch.testing.assert_close(found["plain"], torch.einsum("bti,btj->ij", x, x) / 15)
    assert all(torch.equal(mean, mean.T) for mean in found.values())


def test_a_portion_that_two_layers_read_is_counted_in_each_alone():
    seen = portion(torch.ones(2, 3))
    moments = Moments()
    for layer in ("q", "k", "q"):
        moments.add(layer, seen)
    assert torch.equal(moments.means()["q"], torch.ones(3, 3))
    assert torch.equal(seen.products, 2 * torch.ones(3, 3))


@pytest.fixture(scope="module")
def trio():
    """FA, FB and an FA of another rank and scale; its moments by digest, and generic ones."""
    pairs = [
        (make_concept("one", slot=0), 1.0),
        (make_concept("two", "fb", slot=1), 0.5),
        (make_concept("three", rank=2, slot=4, alpha=3.0), -0.7),
    ]
    concepts = [(sealed(concept), weight) for concept, weight in pairs]
    generator = torch.Generator().manual_seed(5)

    def moments():
        drawn = {n: torch.randn(60, s[1], generator=generator) for n, s in SHAPES.items()}
        return {layer: x.T @ x / len(x) for layer, x in drawn.items()}

    return concepts, {c.meta.digest: moments() for c, _ in concepts}, moments()


def test_copies_hold_the_weights_and_act_as_the_layers_solution(trio):
    concepts, own, generic = trio
    copies = calibrated_concepts(concepts, own, generic, W_G, RIDGE)
    assert [c.meta.digest for c in copies] == sorted(own)
    updates = [concept_updates(concept, weight) for concept, weight in concepts]
    for layer in SHAPES:
        moments = {digest: own[digest][layer] for digest in own}
        here = [of_concept[layer] for of_concept in updates]
        factors = calibrated_factors(here, moments, generic[layer], W_G, RIDGE)
        for copy in copies:
            (folded,) = [u for name, u in concept_updates(copy, 1.0).items() if name == layer]
            assert folded.scale == 1.0
            assert torch.equal(folded.factor, factors[copy.meta.digest].float())


def test_copies_do_not_depend_on_the_order_and_leave_the_originals_alone(trio):
    concepts, own, generic = trio
    before = [{n: s.factor.clone() for n, s in c.layers.items()} for c, _ in concepts]
    first = calibrated_concepts(concepts, own, generic, W_G, RIDGE)
    turned = dict(reversed(own.items()))
    second = calibrated_concepts(concepts[::-1], turned, generic, W_G, RIDGE)
    for a, b in zip(first, second, strict=True):
        assert a.meta == b.meta
        assert all(torch.equal(a.layers[n].factor, b.layers[n].factor) for n in SHAPES)
    for (concept, _), kept in zip(concepts, before, strict=True):
        assert all(torch.equal(concept.layers[n].factor, kept[n]) for n in SHAPES)


def test_a_layer_without_a_solution_is_named(trio):
    concepts, own, generic = trio
    layer = max(SHAPES)
    broken = {**generic, layer: torch.full_like(generic[layer], torch.inf)}
    with pytest.raises(NonFiniteError, match=layer):
        calibrated_concepts(concepts, own, broken, W_G, RIDGE)


def test_concepts_that_adapt_different_layers_are_fitted_together(trio):
    concepts, own, generic = trio
    layer = min(SHAPES)
    (one, weight), *others = concepts
    fewer = Concept(one.meta, {n: s for n, s in one.layers.items() if n != layer})
    silent = Concept(
        one.meta,
        {
            n: LayerFactor(s.indices, s.factor * (n != layer), s.extras)
            for n, s in one.layers.items()
        },
    )
    some = calibrated_concepts([(fewer, weight), *others], own, generic, W_G, RIDGE)
    find = {copy.meta.digest: copy for copy in some}
    assert layer not in find[one.meta.digest].layers
    # FB rows hold every column, so a silent FA concept only adds columns of zeros to fit with.
    every = calibrated_concepts([(silent, weight), *others], own, generic, W_G, RIDGE)
    rows = others[0][0].meta.digest
    (full,) = [copy for copy in every if copy.meta.digest == rows]
    torch.testing.assert_close(find[rows].layers[layer].factor, full.layers[layer].factor)
