"""May concepts live in one model? Same base, own names, own tokens, own indices."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal
from weakref import WeakKeyDictionary, WeakSet

from sbora_diffusion.core.errors import BaseMismatch, ConflictError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.schema import Concept

_SHARED: WeakKeyDictionary[Concept, WeakKeyDictionary[Concept, Mapping[str, int]]] = (
    WeakKeyDictionary()
)
_SAME: WeakKeyDictionary[Concept, WeakSet[Concept]] = WeakKeyDictionary()
"""Concepts to those that are known to have the same base, value for value."""


def check_mergeable(
    concepts: Sequence[Concept], allow_overlap: bool = False
) -> Literal["same", "rounded"]:
    """May these concepts live in one model?

    Concepts of one variant must own disjoint indices; an FA and an FB concept always share entries
    and are not compared.

    Returns:
        "rounded" when some were trained on an fp16 or bf16 copy of the others' base, else "same".

    Raises:
        BaseMismatch: two were trained on different bases.
        ConflictError: two share a name, a placeholder token or, unless allowed, indices.
    """
    relations = [_known_relation(*pair) for pair in combinations(concepts, 2)]
    _refuse_repeats("name", [concept.meta.name for concept in concepts])
    _refuse_repeats("token", [entry.token for c in concepts for entry in c.meta.tokens])
    if not allow_overlap:
        _refuse_overlap(concepts)
    return "rounded" if "rounded" in relations else "same"


def overlaps(concepts: Sequence[Concept]) -> dict[tuple[str, str], dict[str, int]]:
    """Indices that two concepts of one variant both own.

    Returns:
        The two names, in the order of `concepts`, to layer to number of shared indices; only pairs
        and layers that share any.
    """
    shared: dict[tuple[str, str], dict[str, int]] = {}
    for variant in ("fa", "fb"):
        of_variant = [concept for concept in concepts if concept.meta.variant == variant]
        for layer in sorted({layer for concept in of_variant for layer in concept.layers}):
            for pair, number in _shared_in(layer, of_variant):
                shared.setdefault(pair, {})[layer] = number
    return shared


def shared_indices(first: Concept, second: Concept) -> Mapping[str, int]:
    """Layer to number of indices that two concepts of one variant both own, where there are any;
    found out once for each pair."""
    one, other = sorted((first, second), key=id)
    known = _SHARED.setdefault(one, WeakKeyDictionary())
    if other not in known:
        known[other] = {
            layer: len(stored.owned & other.layers[layer].owned)
            for layer, stored in one.layers.items()
            if layer in other.layers and not stored.owned.isdisjoint(other.layers[layer].owned)
        }
    return known[other]


def crossings(concepts: Sequence[Concept]) -> dict[tuple[str, str], dict[str, int]]:
    """Entries of a weight that an FA and an FB concept both write: r_a · r_b in each layer.

    Returns:
        The two names, in the order of `concepts`, to layer to number of shared entries.
    """
    return {
        (first.meta.name, second.meta.name): {
            layer: first.layers[layer].indices.numel() * second.layers[layer].indices.numel()
            for layer in sorted(first.layers.keys() & second.layers.keys())
        }
        for first, second in combinations(concepts, 2)
        if first.meta.variant != second.meta.variant
    }


def _shared_in(layer: str, concepts: list[Concept]) -> Iterator[tuple[tuple[str, str], int]]:
    owners = [(c.meta.name, c.layers[layer].owned) for c in concepts if layer in c.layers]
    union = frozenset().union(*(owned for _, owned in owners))
    if len(union) == sum(len(owned) for _, owned in owners):
        return  # the usual case, without looking at every pair
    for (first, own), (second, others) in combinations(owners, 2):
        if own & others:
            yield (first, second), len(own & others)


def _known_relation(first: Concept, second: Concept) -> Literal["same", "rounded"]:
    """`same_base`, of which comparing hundreds of digests is done once for each pair."""
    if second in _SAME.get(first, ()):
        return "same"
    relation = same_base(first, second)
    if relation == "same":
        _SAME.setdefault(first, WeakSet()).add(second)
    return relation


def same_base(first: Concept, second: Concept) -> Literal["same", "rounded"]:
    """Were two concepts trained on one base, as far as the layers tell that both adapt?

    Raises:
        BaseMismatch: their families or weights differ; names the first layer that does.
    """
    names = f"concepts {first.meta.name!r} and {second.meta.name!r}"
    remedy = "merge concepts that were trained on one base"
    if first.meta.family != second.meta.family:
        families = f"{first.meta.family!r} and {second.meta.family!r}"
        raise BaseMismatch(f"{names} belong to different families, {families}", remedy)
    if first.meta.fingerprint == second.meta.fingerprint:
        return "same"
    shared = first.layers.keys() & second.layers.keys()
    try:
        return compare(
            {layer: first.meta.fingerprint[layer] for layer in shared}, second.meta.fingerprint
        )
    except BaseMismatch as error:
        raise BaseMismatch(f"{names}: {error.problem}", remedy) from error


def _refuse_repeats(what: str, values: list[str]) -> None:
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    if repeated:
        raise ConflictError(
            f"{what} {repeated[0]!r} is used by more than one concept",
            f"give each its own {what} in concept.toml and train it again",
        )


def _refuse_overlap(concepts: Sequence[Concept]) -> None:
    pairs = [pair for pair in combinations(concepts, 2) if _of_one_variant(*pair)]
    if any(shared_indices(*pair) for pair in pairs):
        shared = overlaps(concepts)
        (first, second), layers = min(shared.items())
        others = f" (and {len(shared) - 1} more pairs)" if len(shared) > 1 else ""
        raise ConflictError(
            f"concepts {first!r} and {second!r} share {sum(layers.values())} indices in "
            f"{len(layers)} layers, the first is {min(layers)!r}{others}",
            "train one of them again in a free slot, or pass --allow-overlap",
        )


def _of_one_variant(first: Concept, second: Concept) -> bool:
    return first.meta.variant == second.meta.variant
