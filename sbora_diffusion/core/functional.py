"""SBoRA's two linear maps and their gradients (arXiv 2407.05413, Sections 3 and 4).

Convention: a linear layer has W0 of shape (out, in), y = x W0^T, ΔW = scale · B A with the down
factor A (r, in), the up factor B (out, r) and scale = weight · alpha / rank.

* SBoRA-FA fixes A to r one-hot rows (input indices I) and trains B: ΔW is zero outside columns I.
* SBoRA-FB fixes B to r one-hot columns (output indices I) and trains A: ΔW is zero outside rows I.

The product with a one-hot factor, `sampleMul` in the paper, is a gather (FA) or a scatter-add (FB);
one is the other's gradient. The product with the trained factor saves its input and the factor, so
FA keeps r columns of the layer's input for the backward pass and FB keeps the whole input.

Dtypes: y keeps its dtype. The product is taken in the autocast dtype inside autocast, outside in
the wider of the dtypes of x and factor, and is rounded once to the dtype of y before the sum.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

Variant = Literal["fa", "fb"]


def scaling(alpha: float, rank: int, weight: float = 1.0) -> float:
    """scale = weight · alpha / rank; the one place that fixes the order of the two roundings."""
    return weight * (alpha / rank)


def scaled_factor(factor: Tensor, scale: float) -> Tensor:
    """scale · factor in at least fp32: the non-zero columns (FA, B) or rows (FB, A) of ΔW."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32)) * scale


def sbora_fa(
    y: Tensor,
    x: Tensor,
    factor: Tensor,
    indices: Tensor,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SBoRA-FA, Equation 13: y + scale · x[..., I] B^T, out of place.

    Args:
        y: output of the base layer, (..., out).
        x: input of the base layer, (..., in).
        factor: B, (out, r).
        indices: I, (r,), distinct input indices, int32 or int64.
        scale: weight · alpha / rank.
        dropout: probability of zeroing an entry of the r gathered columns; pass 0 in evaluation.
        generator: source of the dropout mask, torch's default without one. Under activation
            checkpointing only the default is replayed.

    Returns:
        (..., out) in the dtype of y.
    """
    columns = _dropped(_Gather.apply(x, indices), dropout, generator)
    return y + _product(columns, factor, scale, y.dtype)


def sbora_fb(
    y: Tensor,
    x: Tensor,
    factor: Tensor,
    indices: Tensor,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SBoRA-FB, Equation 14: y with scale · x A^T added at the outputs I, out of place.

    Args:
        y: output of the base layer, (..., out).
        x: input of the base layer, (..., in).
        factor: A, (r, in).
        indices: I, (r,), distinct output indices, int32 or int64.
        scale, generator: as for `sbora_fa`.
        dropout: probability of zeroing an entry of x on its way to A; pass 0 in evaluation.

    Returns:
        (..., out) in the dtype of y.
    """
    rows = _product(_dropped(x, dropout, generator), factor, scale, y.dtype)
    return _ScatterAdd.apply(y, rows, indices)


SBORA = {"fa": sbora_fa, "fb": sbora_fb}
"""Variant to map."""


def delta_weight(
    variant: Variant, factor: Tensor, indices: Tensor, shape: tuple[int, int], scale: float
) -> Tensor:
    """ΔW, dense: (out, in) = shape, in at least fp32, exactly zero outside the indices."""
    scaled = scaled_factor(factor, scale)
    return scaled.new_zeros(shape).index_copy(1 if variant == "fa" else 0, indices.long(), scaled)


def one_hot(indices: Tensor, width: int) -> Tensor:
    """The fixed factor, dense: (r, width) with one 1 a row; A of FA, B^T of FB."""
    return F.one_hot(indices.long(), width)


def _product(x: Tensor, factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return _FactorLinear.apply(x, factor, scale, _compute_dtype(x, factor)).to(dtype)


def _compute_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    widest = torch.promote_types(x.dtype, factor.dtype)
    if torch.is_autocast_enabled(x.device.type) and widest != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return widest


def _dropped(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    if p == 0.0:
        return x
    keep = torch.empty_like(x, requires_grad=False).bernoulli_(1.0 - p, generator=generator)
    return x * (keep / (1.0 - p))


class _Gather(Function):
    """x[..., I]; saves the indices alone."""

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> Tensor:
        return x.index_select(-1, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, indices = inputs
        ctx.width = x.shape[-1]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        dx = grad.new_zeros((*grad.shape[:-1], ctx.width))
        return dx.index_add(-1, indices, grad), None


class _ScatterAdd(Function):
    """y with rows added at the last-dimension indices I; saves the indices alone."""

    @staticmethod
    def forward(y: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        return y.index_add(-1, indices, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad, grad.index_select(-1, indices), None


class _FactorLinear(Function):
    """scale · x factor^T in one dtype; saves x and the factor as they came, no cast copies."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return F.linear(x.to(dtype), scaled_factor(factor, scale).to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, factor, ctx.scale, ctx.dtype = inputs
        ctx.save_for_backward(x, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, factor = ctx.saved_tensors
        dx = dfactor = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ scaled_factor(factor, ctx.scale).to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = _rows(grad).T @ _rows(x).to(ctx.dtype)
            dfactor = scaled_factor(product, ctx.scale).to(factor.dtype)
        return dx, dfactor, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
