"""A set of concepts folded into a model's layers, which changes by what comes and goes."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.core.compatibility import shared_indices
from sbora_diffusion.core.concept import Concept, refuse_extras
from sbora_diffusion.core.errors import (
    BaseMismatch,
    ConfigError,
    ConflictError,
    FormatError,
    NonFiniteError,
)
from sbora_diffusion.core.merging import (
    Change,
    Originals,
    change_writes,
    prepare,
)
from sbora_diffusion.core.shares import Share, concept_updates
from sbora_diffusion.core.stacked_merging import Stack, fold_stacks
from sbora_diffusion.core.writing import Writes, write_all

__all__ = ["FoldedSet", "Switch", "Weighted", "concept_updates", "refuse_bad_weight"]

Weighted = tuple[Concept, float]
"""A concept and its weight λ."""
Blocks = dict[str, dict[str, Tensor]]
"""Digest to layer to the unfolded weight's entries in the concept's columns or rows."""


@dataclass(frozen=True, eq=False)
class Switch:
    """A planned step to another set, which `FoldedSet.commit` computes and writes."""

    concepts: list[Weighted]
    shares: dict[str, Share]  # by digest, in their order
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
        self._shares: dict[str, Share] = {}
        self._blocks: Blocks = {}

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
        shares = {concept.meta.digest: self._share(concept, w) for concept, w in wanted}
        changed = self._changed(shares)
        touched = set().union(*(share.concept.layers for share in changed))
        return Switch(wanted, shares, sorted(touched))

    def commit(self, step: Switch) -> None:
        """Write a step that was planned from the present set: all of it or nothing.

        Layers in which no concept meets another are done together, see `stacked_merging`; any other
        is computed right before it is written, while its entries are in the cache. What goes wrong
        later undoes what was written, bit for bit.

        Raises:
            BaseMismatch: a layer is missing.
            ConflictError: a concept is given twice.
            FormatError: a factor does not fit its layer.
            NonFiniteError: an entry would overflow; names the concepts.
        """
        try:
            blocks = self._written(step, self._stacks(step))
        except NonFiniteError:  # layer by layer, which finds out whose entries they are
            blocks = self._written(step, [])
        self.concepts, self._shares, self._blocks = step.concepts, step.shares, blocks

    def _share(self, concept: Concept, weight: float) -> Share:
        if any(concept is known and weight == old for known, old in self.concepts):
            return self._shares[concept.meta.digest]
        refuse_bad_weight(weight)
        refuse_extras(concept)
        return Share(concept, weight)

    def _changed(self, shares: Mapping[str, Share]) -> list[Share]:
        """What comes or goes; a concept that gets another weight does both."""
        digests = sorted(shares.keys() | self._shares.keys())
        differ = [d for d in digests if shares.get(d) is not self._shares.get(d)]
        return [share[d] for share in (self._shares, shares) for d in differ if d in share]

    def _written(self, step: Switch, stacks: list[Stack]) -> Blocks:
        after = {digest: dict(self._blocks.get(digest, ())) for digest in step.shares}
        stacked = {layer for stack in stacks for layer in stack.layers}

        def writes() -> Iterator[Writes]:
            yield from fold_stacks(stacks, self._blocks, after)
            for layer in step.layers:
                if layer not in stacked:
                    change = self._change(layer, step)
                    for digest, block in change.originals.blocks.items():
                        after[digest][layer] = block
                    yield from change_writes(change)

        write_all(writes())
        return after

    def _stacks(self, step: Switch) -> list[Stack]:
        """The layers in which what comes and goes meets nothing else, by what they have in common.

        Layers that were moved or cast since, and those that errors would come from, are left out.
        """
        changed = self._changed(step.shares)
        # One digest stands for one object here; a copy, or a second one, goes layer by layer.
        objects = {share.concept for share in (*self._shares.values(), *changed)}
        digests = self._shares.keys() | step.shares.keys()
        if len(step.shares) < len(step.concepts) or len(objects) > len(digests):
            return []
        if not all(share.footprint.even for share in changed):
            return []
        come = [share for share in changed if step.shares.get(share.digest) is share]
        gone = [share for share in changed if share.digest not in step.shares]
        found = []
        for layers, weights in self._alike(step.layers, changed, self._met(changed, step)):
            coming = tuple(share for share in come if layers[0] in share.concept.layers)
            going = tuple(share for share in gone if layers[0] in share.concept.layers)
            stack = Stack(layers, weights, going, coming)
            if not stack.fits:
                return []
            found.append(stack)
        return found

    def _alike(
        self, layers: Sequence[str], changed: list[Share], met: set[str]
    ) -> Iterator[tuple[tuple[str, ...], tuple[Tensor, ...]]]:
        """Layers outside of `met`, of one type and device, in which the same concepts change.

        Those of one shape stand next to each other.
        """
        every = {share.footprint.layers for share in changed}
        held: dict[str, Tensor] = {}
        for blocks in self._blocks.values():
            held |= blocks
        found: defaultdict[Any, defaultdict[torch.Size, list[str]]]
        found = defaultdict(lambda: defaultdict(list))
        weights = {}
        for layer in layers:
            if layer not in met and layer in self.layers:
                weights[layer] = weight = _weight(self.layers[layer])
                dtype, device = weight.dtype, weight.device
                block = held.get(layer, weight)
                if block.dtype == dtype and block.device == device:
                    who = len(every) == 1 or tuple(layer in names for names in every)
                    found[dtype, device, who][weight.shape].append(layer)
        for by_shape in found.values():
            names = tuple(chain.from_iterable(by_shape.values()))
            yield names, tuple(weights[name] for name in names)

    def _met(self, changed: list[Share], step: Switch) -> set[str]:
        """Layers in which a concept that comes or goes shares entries with another one."""
        every = list(dict.fromkeys([*self._shares.values(), *step.shares.values()]))
        differ, met = set(changed), set[str]()
        for one, other in combinations(every, 2):
            if one.concept is not other.concept and (one in differ or other in differ):
                met.update(_shared_layers(one.concept, other.concept))
        return met

    def _change(self, layer: str, step: Switch) -> Change:
        updates = [
            step.shares[concept.meta.digest].updates[layer]
            for concept, _ in step.concepts
            if layer in concept.layers
        ]
        if layer not in self.layers:
            raise BaseMismatch(f"the base has no layer {layer!r}", "give the concepts' own base")
        try:
            return prepare(self.layers[layer].weight, self._originals(layer), updates)
        except (ConflictError, FormatError, NonFiniteError) as error:
            problem = f"{layer}: {error.problem}"
            for concept, _ in step.concepts:
                problem = problem.replace(concept.meta.digest, concept.meta.name)
            raise type(error)(problem, error.remedy) from error

    def _originals(self, layer: str) -> Originals:
        shares = {d: share for d, share in self._shares.items() if layer in share.concept.layers}
        updates = {digest: share.updates[layer] for digest, share in shares.items()}
        return Originals(updates, {digest: self._blocks[digest][layer] for digest in shares})


def _weight(layer: nn.Linear) -> Tensor:
    """Its weight, without `nn.Module`'s way to an attribute, which takes longer than the rest."""
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight


def _shared_layers(one: Concept, other: Concept) -> Iterable[str]:
    if one.meta.variant == other.meta.variant:
        return shared_indices(one, other)
    return one.layers.keys() & other.layers.keys()


def refuse_bad_weight(weight: float) -> None:
    """Raise ConfigError for a weight λ that is no finite number."""
    if not math.isfinite(weight):
        raise ConfigError(f"a concept's weight must be a finite number, got {weight}")
