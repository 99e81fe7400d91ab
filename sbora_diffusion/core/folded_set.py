"""A set of concepts folded into a model's layers, which changes by what comes and goes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sbora_diffusion.core.concept import Concept, refuse_extras
from sbora_diffusion.core.errors import (
    BaseMismatch,
    ConfigError,
    ConflictError,
    FormatError,
    NonFiniteError,
)
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.merging import Change, Originals, commit, prepare
from sbora_diffusion.core.updates import Update

Weighted = tuple[Concept, float]
"""A concept and its weight λ."""


@dataclass(frozen=True, eq=False)
class Switch:
    """A planned step to another set, which `FoldedSet.commit` computes and writes."""

    concepts: list[Weighted]
    updates: dict[str, dict[str, Update]]  # digest → layer → update
    layers: list[str]  # what has to be rebuilt


class FoldedSet:
    """Concepts folded in place: each touched entry is cast(fp32(W0) + Σ λ·scale·Δ), see `merging`.

    Any way to a set gives the bytes of building it at once; the empty set is the base, bit for bit.
    Whether concepts belong to this base and may live together is asked elsewhere, by `compare` and
    `check_mergeable`.

    Args:
        layers: canonical name to linear layer, nothing folded into them.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = layers
        self.concepts: list[Weighted] = []  # in the order of the digests
        self._updates: dict[str, dict[str, Update]] = {}
        self._originals: dict[str, Originals] = {}

    def switch(self, concepts: Sequence[Weighted]) -> None:
        """Go to another set; touches only rows and columns of concepts that differ.

        Concepts that stay are recognised as objects; a copy costs time but gives the same bytes.

        Raises:
            What `prepare` and `commit` raise; nothing is changed then.
        """
        self.commit(self.prepare(concepts))

    def prepare(self, concepts: Sequence[Weighted]) -> Switch:
        """Plan a step to another set: which layers differ; nothing is written.

        Raises:
            ConfigError: a weight λ is not finite.
            FormatError: a concept stores more than updates of weights.
        """
        wanted = sorted(concepts, key=lambda pair: pair[0].meta.digest)
        updates = {concept.meta.digest: self._updates_of(concept, w) for concept, w in wanted}
        digests = updates.keys() | self._updates.keys()
        differ = [d for d in digests if updates.get(d) is not self._updates.get(d)]
        touched = {
            layer
            for digest in differ
            for layer in (*updates.get(digest, ()), *self._updates.get(digest, ()))
        }
        return Switch(wanted, updates, sorted(touched))

    def commit(self, step: Switch) -> None:
        """Write a step that was planned from the present set: all of it or nothing.

        A layer is computed right before it is written, while its entries are in the cache; what
        goes wrong in a later layer undoes the earlier ones, bit for bit.

        Raises:
            BaseMismatch: a layer is missing.
            ConflictError: a concept is given twice.
            FormatError: a factor does not fit its layer.
            NonFiniteError: an entry would overflow; names the concepts.
        """
        after: dict[str, Originals] = {}

        def changes() -> Iterator[Change]:
            for layer in step.layers:
                change = self._change(layer, step)
                after[layer] = change.originals
                yield change

        commit(changes())
        self._originals |= after
        self.concepts, self._updates = step.concepts, step.updates

    def _updates_of(self, concept: Concept, weight: float) -> dict[str, Update]:
        if any(concept is known and weight == old for known, old in self.concepts):
            return self._updates[concept.meta.digest]
        refuse_bad_weight(weight)
        return concept_updates(concept, weight)

    def _change(self, layer: str, step: Switch) -> Change:
        updates = [
            step.updates[concept.meta.digest][layer]
            for concept, _ in step.concepts
            if layer in concept.layers
        ]
        if layer not in self.layers:
            raise BaseMismatch(f"the base has no layer {layer!r}", "give the concepts' own base")
        try:
            originals = self._originals.get(layer, Originals())
            return prepare(self.layers[layer].weight, originals, updates)
        except (ConflictError, FormatError, NonFiniteError) as error:
            problem = f"{layer}: {error.problem}"
            for concept, _ in step.concepts:
                problem = problem.replace(concept.meta.digest, concept.meta.name)
            raise type(error)(problem, error.remedy) from error


def refuse_bad_weight(weight: float) -> None:
    """Raise ConfigError for a weight λ that is no finite number."""
    if not math.isfinite(weight):
        raise ConfigError(f"a concept's weight must be a finite number, got {weight}")


def concept_updates(concept: Concept, weight: float) -> dict[str, Update]:
    """A concept's share of each of its layers, with scale λ·alpha/rank.

    Raises:
        FormatError: it stores more than updates of weights.
    """
    refuse_extras(concept)
    meta = concept.meta
    scale = scaling(meta.alpha, meta.rank, weight)
    return {
        layer: Update(meta.digest, meta.variant, stored.indices, stored.factor, scale)
        for layer, stored in concept.layers.items()
    }
