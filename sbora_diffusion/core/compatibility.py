"""May concepts live in one model? Same base, own names, own tokens, own indices."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from sbora_diffusion.core.errors import BaseMismatch, ConflictError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.schema import Concept


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
    relations = [_same_base(first, second) for first, second in combinations(concepts, 2)]
    _refuse_repeats("name", [concept.meta.name for concept in concepts])
    _refuse_repeats("token", [entry.token for c in concepts for entry in c.meta.tokens])
    if not allow_overlap:
        for variant in ("fa", "fb"):
            _refuse_overlap([concept for concept in concepts if concept.meta.variant == variant])
    return "rounded" if "rounded" in relations else "same"


def _same_base(first: Concept, second: Concept) -> Literal["same", "rounded"]:
    names = f"concepts {first.meta.name!r} and {second.meta.name!r}"
    remedy = "merge concepts that were trained on one base"
    if first.meta.family != second.meta.family:
        families = f"{first.meta.family!r} and {second.meta.family!r}"
        raise BaseMismatch(f"{names} belong to different families, {families}", remedy)
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


def _refuse_overlap(concepts: list[Concept]) -> None:
    shared: Counter[tuple[str, str]] = Counter()
    layers: dict[tuple[str, str], set[str]] = {}
    owners: dict[tuple[str, int], str] = {}
    for concept in concepts:
        for layer in sorted(concept.layers):
            for index in concept.layers[layer].indices.tolist():
                owner = owners.setdefault((layer, index), concept.meta.name)
                if owner != concept.meta.name:
                    shared[owner, concept.meta.name] += 1
                    layers.setdefault((owner, concept.meta.name), set()).add(layer)
    if shared:
        pair = min(shared)
        raise ConflictError(
            f"concepts {pair[0]!r} and {pair[1]!r} share {shared[pair]} indices in "
            f"{len(layers[pair])} layers, the first is {min(layers[pair])!r}",
            "train one of them again in a free slot, or pass --allow-overlap",
        )
