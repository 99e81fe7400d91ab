"""Folding many layers at once, where no concept meets another: the usual case, and the quick one.

The entries of all layers lie in one flat tensor, layers of one shape next to each other, so that
all arithmetic is a few operations for all of them, and they are read and written once, see
`strips`. The entries get the bytes that `merging.prepare` gives: of all that may touch them, there
is one update alone (`merging.folded_alone`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.functional import scaled_factor
from sbora_diffusion.core.merging import folded_alone
from sbora_diffusion.core.shares import Share
from sbora_diffusion.core.strips import Strips
from sbora_diffusion.core.writing import Writes

Blocks = Mapping[str, Mapping[str, Tensor]]
"""Digest to layer to the unfolded weight's entries in the concept's columns or rows."""
AT_ONCE = 1 << 16
"""Entries that a CPU reads before it writes: strided ones, of which a cache holds few."""


class Section(NamedTuple):
    """Layers of one shape that stand next to each other in a stack, and the first one's weight."""

    layers: tuple[str, ...]
    weight: Tensor

    def form(self, dim: int, rank: int) -> tuple[int, int, int]:
        """(layers, out, rank) for columns, dim 1, or (layers, rank, in) for rows."""
        rows, columns = self.weight.shape
        return (len(self.layers), rows, rank) if dim == 1 else (len(self.layers), rank, columns)


class Part(NamedTuple):
    """Entries of so many columns or rows of each layer of a stack, flat."""

    flat: Tensor
    rank: int


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers of one type and device in which the same concepts come and go.

    Attributes:
        weights: of the layers, in this order; those of one shape next to each other.
        gone: concepts whose places get their original entries back.
        come: concepts that are folded in, or get another weight λ; all of one variant, and none
            shares an index with another one of the set.
    """

    layers: tuple[str, ...]
    weights: tuple[Tensor, ...]
    gone: tuple[Share, ...]
    come: tuple[Share, ...]

    @property
    def shares(self) -> tuple[Share, ...]:
        return (*self.gone, *self.come)

    @property
    def fits(self) -> bool:
        """Do the factors and indices of what comes fit the weights?"""
        return all(s.fits(part.layers, part.weight) for s in self.come for part in self.sections)

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def dim(self) -> int:
        """The dimension of the weights that the concepts' indices count."""
        return self.shares[0].dim

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        found, start = [], 0
        for _, some in groupby(self.weights, key=attrgetter("shape")):
            stop = start + len(list(some))
            found.append(Section(self.layers[start:stop], self.weights[start]))
            start = stop
        return tuple(found)

    def pieces(self) -> Iterator["Stack"]:
        """Itself in parts whose entries stay in a CPU's cache until written."""
        rank = sum(share.rank for share in self.shares)
        sizes = [math.prod(section.form(self.dim, rank)) for section in self.sections]
        if sum(sizes) <= AT_ONCE:
            yield self
            return
        start = 0
        for section, size in zip(self.sections, sizes, strict=True):
            stop = start + len(section.layers)
            step = max(1, AT_ONCE * len(section.layers) // size)
            for first in range(start, stop, step):
                part = slice(first, min(first + step, stop))
                yield Stack(self.layers[part], self.weights[part], self.gone, self.come)
            start = stop

    def joined(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Each layer's entries, flat."""
        return _flat(
            [torch.cat([entries[name] for name in section.layers]) for section in self.sections]
        )

    def split(self, part: Part) -> list[Tensor]:
        """What a part has of each section, in its form."""
        forms = [section.form(self.dim, part.rank) for section in self.sections]
        if len(forms) == 1:
            return [part.flat.view(forms[0])]
        flats = part.flat.split([math.prod(form) for form in forms])
        return [flat.view(form) for flat, form in zip(flats, forms, strict=True)]

    def woven(self, parts: Sequence[Part]) -> Tensor:
        """Parts side by side in each layer, flat."""
        if len(parts) == 1:
            return parts[0].flat
        sections = zip(*(self.split(part) for part in parts), strict=True)
        return _flat([torch.cat(some, self.dim + 1) for some in sections])

    def unwoven(self, flat: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """The inverse of `woven`."""
        if len(ranks) == 1:
            return [flat]
        sections = [s.split(ranks, self.dim + 1) for s in self.split(Part(flat, sum(ranks)))]
        return [_flat(of_part) for of_part in zip(*sections, strict=True)]


@dataclass(frozen=True, eq=False)
class Computed:
    """What `fold_stacks` is about to write.

    Attributes:
        blocks: digest to layer to the original entries of concepts that come.
        total: the sum of all new entries, finite if these are.
    """

    writes: Writes
    blocks: dict[str, dict[str, Tensor]]
    total: Tensor | None


def fold_stacks(
    stacks: Iterable[Stack], before: Blocks, after: dict[str, dict[str, Tensor]]
) -> Iterator[Writes]:
    """Compute stacks, and yield what has to be written; a device is waited for once.

    Args:
        before: of all concepts that are folded now.
        after: gets the blocks of the concepts that come.

    Raises:
        NonFiniteError: without a name; an entry, or the sum of all, is not finite.
    """
    batches: dict[torch.device, list[Stack]] = {}
    for stack in stacks:
        if stack.device.type == "cpu":
            for piece in stack.pieces():
                yield from _checked([piece], before, after)
        else:
            batches.setdefault(stack.device, []).append(stack)
    for batch in batches.values():
        yield from _checked(batch, before, after)


def _checked(
    stacks: Iterable[Stack], before: Blocks, after: dict[str, dict[str, Tensor]]
) -> Iterator[Writes]:
    computed = [_computed(stack, before) for stack in stacks]
    totals = [one.total for one in computed if one.total is not None]
    if totals and not math.isfinite(torch.stack(totals).sum()):
        raise NonFiniteError("a folded weight is not finite", "lower the weights of the concepts")
    for one in computed:
        for digest, blocks in one.blocks.items():
            after[digest] |= blocks
        yield one.writes


@torch.no_grad()
def _computed(stack: Stack, before: Blocks) -> Computed:
    strips = _strips(stack)
    was = strips.read()
    parts = [Part(stack.joined(before[share.digest]), share.rank) for share in stack.gone]
    blocks, total = {}, None
    if stack.come:
        originals = _originals(stack, before, was)
        alone = not stack.gone and before.keys().isdisjoint(share.digest for share in stack.come)
        folded = folded_alone(_scaled(stack), was if alone else stack.woven(originals))
        total = folded.sum(dtype=torch.float32)
        parts.append(Part(folded, sum(share.rank for share in stack.come)))
        blocks = {
            share.digest: dict(zip(stack.layers, _layers(stack, original), strict=True))
            for share, original in zip(stack.come, originals, strict=True)
            if share.digest not in before
        }
    return Computed(Writes(strips, stack.woven(parts), was), blocks, total)


def _strips(stack: Stack) -> Strips:
    """All that the concepts own, side by side in each weight."""
    places = [share.places(stack.layers, stack.device) for share in stack.shares]
    joined = torch.cat(places, 1) if len(places) > 1 else places[0]
    return Strips(stack.dim, stack.weights, joined)


def _originals(stack: Stack, before: Blocks, was: Tensor) -> list[Part]:
    """The unfolded entries of each concept that comes.

    What stands at the places of one that was not there before is not folded by any other.
    """
    now = stack.unwoven(was, [share.rank for share in stack.shares])[len(stack.gone) :]
    return [
        Part(stack.joined(before[s.digest]) if s.digest in before else flat, s.rank)
        for s, flat in zip(stack.come, now, strict=True)
    ]


def _scaled(stack: Stack) -> Tensor:
    """scale · Δ of all that comes, in at least fp32, side by side."""
    wide = torch.promote_types(stack.weights[0].dtype, torch.float32)
    parts = []
    for share in stack.come:
        factors = {layer: stored.factor for layer, stored in share.concept.layers.items()}
        scaled = scaled_factor(stack.joined(factors).to(stack.device), share.scale)
        parts.append(Part(scaled.to(wide), share.rank))
    return stack.woven(parts)


def _layers(stack: Stack, part: Part) -> Iterator[Tensor]:
    """What a part has of each layer."""
    return chain.from_iterable(section.unbind() for section in stack.split(part))


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """All entries, one part after another."""
    return (
        torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1)
    )
