"""Folding many layers at once, where no concept meets another: the usual case, and the quick one.

Layers of one shape are stacked, so that all arithmetic is a few operations for all of them, and
each stack is read and written once, see `strips`. The entries get the bytes that `merging.prepare`
gives: of all that may touch them, there is one update alone (`merging.folded_alone`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers of one shape, type and device in which the same concepts come and go.

    Attributes:
        weights: of the layers, in this order.
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
    def weight(self) -> Tensor:
        """Any one."""
        return self.weights[0]

    def parts(self) -> Iterator["Stack"]:
        """Itself on a GPU; on a CPU pieces whose entries stay in the cache until written."""
        weight, dim = self.weight, self.shares[0].dim
        each = weight.shape[1 - dim] * sum(share.concept.meta.rank for share in self.shares)
        step = max(1, AT_ONCE // each) if weight.device.type == "cpu" else len(self.weights)
        for start in range(0, len(self.weights), step):
            part = slice(start, start + step)
            yield Stack(self.layers[part], self.weights[part], self.gone, self.come)


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
        if stack.weight.device.type == "cpu":
            for part in stack.parts():
                yield from _checked([part], before, after)
        else:
            batches.setdefault(stack.weight.device, []).append(stack)
    for batch in batches.values():
        yield from _checked(batch, before, after)


def _checked(
    stacks: Iterable[Stack], before: Blocks, after: dict[str, dict[str, Tensor]]
) -> Iterator[Writes]:
    computed = [_computed(stack, before) for stack in stacks]
    totals = [one.total for one in computed if one.total is not None]
    if totals and not math.isfinite(torch.stack(totals).sum()):
        raise NonFiniteError("a folded weight is not finite")
    for one in computed:
        for digest, blocks in one.blocks.items():
            after[digest] |= blocks
        yield one.writes


@torch.no_grad()
def _computed(stack: Stack, before: Blocks) -> Computed:
    layers, dim = stack.layers, stack.shares[0].dim + 1
    strips = _strips(stack)
    was = strips.read().view(len(layers), *strips.shapes[0])
    parts = [_stacked(before[share.digest], layers) for share in stack.gone]
    blocks, total = {}, None
    if stack.come:
        originals = _originals(stack, before, was)
        folded = _folded(stack, originals)
        total = folded.sum(dtype=torch.float32)
        blocks = {
            share.digest: dict(zip(layers, original.unbind(), strict=True))
            for share, original in zip(stack.come, originals, strict=True)
            if share.digest not in before
        }
        parts.append(folded)
    return Computed(Writes(strips, _side_by_side(parts, dim), was), blocks, total)


def _strips(stack: Stack) -> Strips:
    """All that the concepts own, side by side in each weight."""
    device, dim = stack.weight.device, stack.shares[0].dim
    places = [share.places(stack.layers, device) for share in stack.shares]
    return Strips(dim, stack.weights, _side_by_side(places, 1))


def _originals(stack: Stack, before: Blocks, was: Tensor) -> list[Tensor]:
    """The unfolded entries of each concept that comes: (layers, out, r) or (layers, r, in).

    What stands at the places of one that was not there before is not folded by any other.
    """
    offset = sum(share.concept.meta.rank for share in stack.gone)
    dim, found = stack.shares[0].dim + 1, []
    for share in stack.come:
        rank = share.concept.meta.rank
        if share.digest in before:
            found.append(_stacked(before[share.digest], stack.layers))
        else:
            found.append(was.narrow(dim, offset, rank).contiguous())
        offset += rank
    return found


def _folded(stack: Stack, originals: list[Tensor]) -> Tensor:
    """cast(fp32(W0) + scale · Δ) of all that comes, stacked and side by side."""
    dim = stack.shares[0].dim + 1
    original = _side_by_side(originals, dim)
    wide = torch.promote_types(original.dtype, torch.float32)
    scaled = []
    for share in stack.come:
        factors = [share.concept.layers[layer].factor for layer in stack.layers]
        factor = torch.stack(factors).to(original.device)
        scaled.append(scaled_factor(factor, share.scale).to(wide))
    return folded_alone(_side_by_side(scaled, dim), original)


def _stacked(blocks: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    return torch.stack([blocks[layer] for layer in layers])


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
