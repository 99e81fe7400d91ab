"""Calibrated merging: what a set's entries have to be so that each concept hears itself alone.

Disjoint indices make a sum exact, not silent: every update also acts on the other concepts'
activations. The closed form here asks, layer by layer, for the ΔW with entries where the concepts
have theirs that acts on each one's own activations like its own update alone, and on generic ones
like nothing:

    min Σ_q ‖(ΔW − ΔW_q) X_q‖² + w_g ‖ΔW X_gen‖² + ρ tr(G_gen)/d ‖ΔW‖²,  ‖·X‖² as a mean over tokens

With G = mean of x xᵀ, K = Σ_q G_q + w_g G_gen + ρ tr(G_gen)/d · I and T = Σ_q ΔW_q G_q, the row i
with entries allowed in columns S is ΔW_i[S] = T_i[S] · K[S, S]⁻¹. Rows of FB concepts may hold any
column, all other rows the union of the FA concepts' columns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.shares import concept_updates
from sbora_diffusion.core.updates import Update, places_in, union_of

LayerMoments = Mapping[str, Tensor]
"""Layer to the mean second moment of its inputs, (in, in)."""


class Portion(NamedTuple):
    """Some inputs of a layer: Σ w x xᵀ, (in, in), and Σ w."""

    products: Tensor
    weight: float


@torch.no_grad()
def portion(x: Tensor, weights: Tensor | None = None) -> Portion:
    """What inputs (..., in) add to their second moment.

    Args:
        weights: (...), not negative; how much each input counts, 1 by default.
    """
    rows = x.detach().float().reshape(-1, x.shape[-1])
    if weights is None:
        return Portion(rows.T @ rows, float(len(rows)))
    weighted = rows * weights.to(rows).reshape(-1, 1).sqrt()
    return Portion(weighted.T @ weighted, weights.sum(dtype=torch.float64).item())


class Moments:
    """Second moments of layers' inputs, which come in portions."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: defaultdict[str, float] = defaultdict(float)

    def add(self, layer: str, seen: Portion) -> None:
        """Count further inputs of a layer."""
        if layer in self._sums:
            self._sums[layer] += seen.products
        else:
            self._sums[layer] = seen.products.clone()
        self._weights[layer] += seen.weight

    def means(self) -> dict[str, Tensor]:
        """Layer to Σ w x xᵀ / Σ w over everything that was added; symmetric, fp32, on the CPU."""
        halves = {layer: (total / 2).cpu() for layer, total in self._sums.items()}
        return {layer: (half + half.T) / self._weights[layer] for layer, half in halves.items()}


def calibrated_concepts(
    concepts: Sequence[tuple[Concept, float]],
    own: Mapping[str, LayerMoments],
    generic: LayerMoments,
    generic_weight: float,
    ridge: float,
) -> list[Concept]:
    """Copies of a set's concepts that silence each other; to be folded together, with weight 1.

    They hold for this set alone and keep the digests of the originals, which fix the order of
    summation: never write one to a file.

    Args:
        concepts: with their weights λ, which the copies have inside; any order gives the same.
        own: digest to the moments that the concept alone gives, with its weight.
        generic: the moments of the base alone.
        generic_weight, ridge: w_g and ρ.

    Raises:
        FormatError: a concept stores more than updates of weights.
        NonFiniteError: see `calibrated_factors`.
    """
    updates = {c.meta.digest: concept_updates(c, weight) for c, weight in concepts}
    found: dict[str, dict[str, LayerFactor]] = {digest: {} for digest in updates}
    for layer in sorted(set().union(*updates.values())):
        here = [of_concept[layer] for of_concept in updates.values() if layer in of_concept]
        moments = {digest: own[digest][layer] for digest in updates}
        try:
            factors = calibrated_factors(here, moments, generic[layer], generic_weight, ridge)
        except NonFiniteError as error:
            raise NonFiniteError(f"{layer}: {error.problem}", error.remedy) from error
        for update in here:
            found[update.key][layer] = LayerFactor(update.indices, factors[update.key].float())
    ordered = sorted((concept for concept, _ in concepts), key=lambda concept: concept.meta.digest)
    return [_copy(concept, found[concept.meta.digest]) for concept in ordered]


def _copy(concept: Concept, layers: Mapping[str, LayerFactor]) -> Concept:
    meta = concept.meta.model_copy(update={"alpha": float(concept.meta.rank)})  # a scale of 1
    return Concept(meta, layers, concept.embeddings)


def calibrated_factors(
    updates: Sequence[Update],
    own: Mapping[str, Tensor],
    generic: Tensor,
    generic_weight: float,
    ridge: float,
) -> dict[str, Tensor]:
    """One layer's calibrated factors, fp64 on the CPU, in the shape of the updates' own.

    Where FA columns cross FB rows the FB factor holds the entry and the FA factor a zero; an index
    that two updates of one variant share is held by the first in the order of the keys.

    Args:
        updates: one of each concept that adapts the layer.
        own: key to G_q (in, in) of every concept of the set; one without an update is to hear none.
        generic: G_gen, (in, in).
        generic_weight, ridge: w_g and ρ.

    Returns:
        Key to factor, with λ·alpha/rank inside.

    Raises:
        NonFiniteError: the moments leave the solution open, or are not finite.
    """
    ordered = sorted(updates, key=lambda update: update.key)
    moments = {key: own[key].cpu().double() for key in sorted(own)}
    normal = _normal(list(moments.values()), generic.cpu().double(), generic_weight, ridge)
    of_fa = [update for update in ordered if update.variant == "fa"]
    of_fb = [update for update in ordered if update.variant == "fb"]
    acting = {update.key: _on_own(update, moments[update.key]) for update in ordered}
    rows = union_of(of_fb)
    factors: dict[str, Tensor] = {}
    if of_fa:
        columns = union_of(of_fa)
        target = torch.stack([acting[update.key][:, columns] for update in of_fa]).sum(0)
        solved = _solved(normal[columns][:, columns], target)
        factors |= _split(solved.index_fill_(0, rows, 0.0), columns, of_fa, dim=1)
    if of_fb:
        target = normal.new_zeros(len(rows), len(normal))
        for update in of_fa:
            target += acting[update.key][rows]
        for update in of_fb:
            target.index_add_(0, places_in(update, rows), acting[update.key])
        factors |= _split(_solved(normal, target), rows, of_fb, dim=0)
    return factors


def _normal(own: list[Tensor], generic: Tensor, generic_weight: float, ridge: float) -> Tensor:
    """K, (in, in)."""
    total = torch.stack(own).sum(0) + generic_weight * generic
    total.diagonal().add_(ridge * generic.diagonal().mean())
    return total


def _on_own(update: Update, moment: Tensor) -> Tensor:
    """The rows of ΔW_q G_q that are not zero: all (out, in) for FA, its own (r, in) for FB."""
    factor = update.factor.detach().cpu().double() * update.scale
    if update.variant == "fa":
        return factor @ moment[update.index(moment.device)]
    return factor @ moment


def _solved(normal: Tensor, target: Tensor) -> Tensor:
    """The X with X · normal = target, (m, n)."""
    try:
        solution = torch.linalg.solve(normal, target, left=False)
    except torch.linalg.LinAlgError:
        solution = target.new_full((), torch.nan)
    if not solution.isfinite().all():
        raise NonFiniteError(
            "calibration has no finite solution", "raise `ridge`, or merge with --no-calibrate"
        )
    return solution


def _split(solved: Tensor, union: Tensor, updates: Sequence[Update], dim: int) -> dict[str, Tensor]:
    """Each update's columns (dim 1) or rows (dim 0); a shared one goes to the first."""
    left, parts = solved.clone(), {}
    for update in updates:
        places = places_in(update, union)
        parts[update.key] = left.index_select(dim, places)
        left.index_fill_(dim, places, 0.0)
    return parts
