"""Writing single updates again after each optimizer step: the bytes of `merging.fold`, for less.

What does not change between the steps is prepared once. A write is then three operations on lists
of all layers, which a GPU does in a few kernels each, and the write of each layer's own entries.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from sbora_diffusion.core.updates import Update

BY_ROWS = ("cuda",)
"""Kinds of devices on which copying many rows at once takes fewer kernels than layer by layer."""


class Rewrite:
    """One update, alone in a weight, whose factor goes on changing in place.

    Args:
        weight: (out, in).
        update: folded into the weight.
        original: the unfolded weight's entries there, in the shape of the factor.

    Attributes:
        original: in the dtype of the sum.
        block: where new entries are rounded to the weight's dtype.
        rows: the weight's own, each, where an FB update is written by rows; else empty.
        kind: list operations are a few kernels only for tensors of one device and type.
    """

    def __init__(self, weight: Tensor, update: Update, original: Tensor) -> None:
        self.weight, self.update, self.indices = weight, update, update.index(weight.device)
        # `fold` sums from zero, which makes a −0 a +0; adding to a +0 does the same.
        wide = torch.promote_types(original.dtype, torch.float32)
        self.original = original.to(wide, copy=True).add_(0.0)
        self.block = torch.empty_like(original)
        by_rows = weight.device.type in BY_ROWS and update.dim == 0
        self.rows = [weight.detach()[index] for index in update.owned] if by_rows else []
        self.kind = str(weight.device), str(weight.dtype), str(update.factor.dtype), by_rows

    def write(self) -> None:
        """Put the block into the weight."""
        self.weight.index_copy_(self.update.dim, self.indices, self.block)


@torch.no_grad()
def rewrite(rewrites: Sequence[Rewrite]) -> None:
    """Write cast(fp32(W0) + scale · factor) for the factors as they are now; nothing is checked."""
    kind = attrgetter("kind")
    for _, group in groupby(sorted(rewrites, key=kind), key=kind):
        _rewrite(list(group))


def _rewrite(group: list[Rewrite]) -> None:
    totals = torch._foreach_add([one.original for one in group], _scaled(group))
    torch._foreach_copy_([one.block for one in group], totals)
    if group[0].rows:
        rows = [row for one in group for row in one.rows]
        torch._foreach_copy_(rows, [part for one in group for part in one.block.unbind()])
    else:
        for one in group:
            one.write()


def _scaled(group: list[Rewrite]) -> list[Tensor]:
    """scale · factor of each, in at least fp32, then in the dtype of the sum."""
    factors = [one.update.factor for one in group]
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    scaled, scales = [factor.to(wide) for factor in factors], [one.update.scale for one in group]
    if any(scale != 1.0 for scale in scales):
        scaled = list(torch._foreach_mul(scaled, scales))
    return [factor.to(one.original.dtype) for factor, one in zip(scaled, group, strict=True)]
