"""Batches whose rows belong to different concepts: grouped products of equal shape.

What `functional` does with one concept, each row does with its own: FA gathers the row's own
columns of the input, FB adds to the row's own outputs, and the product with the trained factors is
one batched GEMM. Shapes depend on the number of entries, their rank and the batch alone; indices,
factors and the choice of rows are inputs, so that nothing is recompiled when concepts change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sbora_diffusion.core.functional import Variant, compute_dtype
from sbora_diffusion.core.updates import Update


@dataclass(frozen=True, eq=False)
class Bank:
    """Updates of one layer and one variant, stacked.

    Ranks may differ: an entry is padded by indices with scale 0, whose part of the factor neither
    counts nor gets a gradient.

    Attributes:
        factor: B (C, out, r) of FA or A (C, r, in) of FB.
        indices: I, (C, r), int64; distinct within an entry where their scale is not 0, unless
            several concepts share one entry.
        scale: (C, r), weight · alpha / rank of each index; gets no gradient.
    """

    variant: Variant
    factor: Tensor
    indices: Tensor
    scale: Tensor

    def select(self, rows: Tensor) -> "Bank":
        """The bank whose entry k is this one's entry rows[k], or no update where that is −1.

        An entry's gradient is the sum over the rows that chose it.

        Args:
            rows: (B,), int64.
        """
        chosen = rows.clamp_min(0)
        scale = self.scale.index_select(0, chosen) * (rows >= 0)[:, None]
        factor = self.factor.index_select(0, chosen)
        return Bank(self.variant, factor, self.indices.index_select(0, chosen), scale)


def stacked(
    variant: Variant, entries: Sequence[Sequence[Update]], shape: tuple[int, int], like: Tensor
) -> Bank:
    """A bank with one entry for each group of updates; a group's updates are summed.

    Args:
        entries: updates of this variant; an empty group is a row without a concept.
        shape: (out, in) of the layer.
        like: gives the device, and float64 if it is that; factors are fp32 otherwise.
    """
    rank = max(1, *(sum(len(u.indices) for u in group) for group in entries))
    count, (out, in_) = len(entries), shape
    dtype = torch.promote_types(torch.float32, like.dtype)
    form = (count, out, rank) if variant == "fa" else (count, rank, in_)
    factor = torch.zeros(form, dtype=dtype, device=like.device)
    indices = torch.zeros(count, rank, dtype=torch.int64, device=like.device)
    scale = torch.zeros(count, rank, dtype=dtype, device=like.device)
    for entry, group in enumerate(entries):
        start = 0
        for update in group:
            assert update.variant == variant
            stop = start + len(update.indices)
            factor[entry].narrow(update.dim, start, stop - start).copy_(update.factor)
            indices[entry, start:stop] = update.index(like.device)
            scale[entry, start:stop] = update.scale
            start = stop
    return Bank(variant, factor, indices, scale)


def sbora_rows(y: Tensor, x: Tensor, bank: Bank) -> Tensor:
    """y with each row's own update added, out of place.

    Consecutive rows share an entry: with C entries, rows k · B/C to (k + 1) · B/C − 1 belong to
    entry k. `Bank.select` gives every other assignment.

    Args:
        y: output of the base layer, (B, ..., out), B a multiple of C.
        x: input of the base layer, (B, ..., in).

    Returns:
        (B, ..., out) in the dtype of y.
    """
    _, part = branch_rows(x, bank)
    return join_rows(y, part, bank)


def branch_rows(x: Tensor, bank: Bank) -> tuple[Tensor, Tensor]:
    """The part before the base layer, as `functional.branch`: x itself, to be read by the base
    layer, and what goes to `join_rows`, (C, tokens, r)."""
    grouped = _grouped(x, bank)
    if bank.variant == "fa":
        through, part = TakeRows.apply(grouped, bank.indices)
    else:
        dtype = compute_dtype(x, bank.factor)
        through, part = ProjectRows.apply(grouped, bank.factor, bank.scale, dtype)
    # Autograd would ask the base layer for the gradient of an x that needs none.
    return through.view(x.shape) if x.requires_grad else x, part


def join_rows(y: Tensor, part: Tensor, bank: Bank) -> Tensor:
    """y (B, ..., out) with the second path added, out of place."""
    grouped = _grouped(y, bank)
    if bank.variant == "fa":
        dtype = compute_dtype(part, bank.factor)
        joined = AddProductRows.apply(grouped, part, bank.factor, bank.scale, dtype)
    else:
        joined = ScatterAddRows.apply(grouped, part.to(y.dtype), bank.indices)
    return joined.view(y.shape)


def _grouped(x: Tensor, bank: Bank) -> Tensor:
    """(C, tokens, width) of (B, ..., width)."""
    entries = len(bank.indices)
    assert x.shape[0] % entries == 0, f"{x.shape[0]} rows for {entries} entries"
    return x.reshape(entries, -1, x.shape[-1])


class TakeRows(Function):
    """(x, each entry's own columns of x); saves the indices alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        return x.view_as(x), x.gather(-1, _spread(indices, x))

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        if grad is None:
            return dx, None
        target = grad.new_zeros(ctx.shape) if dx is None else dx
        return target.scatter_add(-1, _spread(indices, grad), grad), None


class ScatterAddRows(Function):
    """y with rows added at each entry's own outputs; saves the indices alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, part: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        return y.scatter_add(-1, _spread(indices, part), part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad, grad.gather(-1, _spread(indices, grad)), None


class ProjectRows(Function):
    """(x, scale · x A^T entry by entry), the product in one dtype; saves x and the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, factor, scale)
        return x.view_as(x), x.to(dtype) @ _scaled(factor, scale[..., None], dtype).mT

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, factor, scale = ctx.saved_tensors
        dfactor = None
        if grad is None:
            return dx, None, None, None
        low = grad.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            dx = _plus_products(dx, low, _scaled(factor, scale[..., None], ctx.dtype), x.dtype)
        if ctx.needs_input_grad[1]:
            dfactor = _scaled(low.mT @ x.to(ctx.dtype), scale[..., None], factor.dtype)
        return dx, dfactor, None, None


class AddProductRows(Function):
    """y + scale · columns B^T entry by entry; saves the columns and the factors."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, columns: Tensor, factor: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(columns, factor, scale)
        scaled = _scaled(factor, scale[:, None], dtype)
        return _plus_products(y, columns.to(dtype), scaled.mT, y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, factor, scale = ctx.saved_tensors
        low = grad.to(ctx.dtype)
        dcolumns = dfactor = None
        if ctx.needs_input_grad[1]:
            dcolumns = (low @ _scaled(factor, scale[:, None], ctx.dtype)).to(columns.dtype)
        if ctx.needs_input_grad[2]:
            dfactor = _scaled(low.mT @ columns.to(ctx.dtype), scale[:, None], factor.dtype)
        return grad, dcolumns, dfactor, None, None


def _spread(indices: Tensor, x: Tensor) -> Tensor:
    """(C, r) as (C, tokens, r), without a copy."""
    return indices[:, None].expand(-1, x.shape[1], -1)


def _scaled(factor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · factor, multiplied in at least fp32, in `dtype`."""
    return (factor.to(torch.promote_types(factor.dtype, torch.float32)) * scale).to(dtype)


def _plus_products(y: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """y + a b in `dtype`, a (C, t, n) and b (C, n, m); without a `y`, the products alone."""
    if y is None:
        return (a @ b).to(dtype)
    if a.dtype == y.dtype:
        return torch.baddbmm(y, a, b)
    return y + (a @ b).to(dtype)
