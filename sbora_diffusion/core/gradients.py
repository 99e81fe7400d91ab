"""The gradients behind `functional`: which tensors are kept, and in which dtype products are taken.

Conventions as there: W0 is (out, in), FA's factor B (out, r), FB's factor A (r, in). Saved tensors
are the inputs as they came, never cast copies; a cast is repeated in the backward pass.

The functions have no `setup_context`: with one, each call costs 0.1 ms for binding its arguments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sbora_diffusion.core.recalled import Origin
from sbora_diffusion.core.strips import gathered

FULL = (torch.float32, torch.float64)
"""Dtypes in which a GEMM may add to its output: nothing is rounded between product and sum."""
HALVES = (torch.float16, torch.bfloat16)
MANY, PARTS = 1024, 8
"""Tokens from which on a CPU's product over them is the sum of so many parts."""


def scaled_factor(factor: Tensor, scale: float) -> Tensor:
    """scale · factor in at least fp32: the non-zero columns (FA, B) or rows (FB, A) of ΔW."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32)) * scale


class Take(Function):
    """(x, x[..., I]); saves the indices alone.

    The base layer reads the first output, so that one addition joins both gradients of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.width = x.shape[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        return x.view_as(x), x.index_select(-1, indices)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        if grad is None:
            return dx, None
        if dx is None:
            zeros = grad.new_zeros((*grad.shape[:-1], ctx.width))
            return zeros.index_add_(-1, indices, grad), None
        return dx.index_add(-1, indices, grad), None


class ScatterAdd(Function):
    """y with rows added at the last-dimension indices I; saves the indices alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        return y.index_add(-1, indices, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad, grad.index_select(-1, indices), None


class Project(Function):
    """(x, scale · x factor^T), the product in one dtype; saves x and the factor.

    The base layer reads the first output, as for `Take`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.dtype = scale, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, factor)
        return x.view_as(x), F.linear(x.to(dtype), scaled_factor(factor, scale).to(dtype))

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, factor = ctx.saved_tensors
        dfactor = None
        if grad is None:
            return dx, None, None, None
        if ctx.needs_input_grad[0]:
            scaled = scaled_factor(factor, ctx.scale).to(ctx.dtype)
            dx = _plus_product(dx, grad, scaled, x.dtype)
        if ctx.needs_input_grad[1]:
            dfactor = factor_gradient(grad, x, ctx.scale, ctx.dtype, factor.dtype)
        return dx, dfactor, None, None


class AddProduct(Function):
    """y + scale · x factor^T, the product in one dtype; saves x and the factor."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, factor: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.scale, ctx.dtype = scale, dtype
        ctx.save_for_backward(x, factor)
        scaled = scaled_factor(factor, scale).to(dtype)
        return _plus_product(y, x.to(dtype), scaled.T, y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        low = grad.to(ctx.dtype)
        dx = dfactor = None
        if ctx.needs_input_grad[1]:
            dx = (low @ scaled_factor(factor, ctx.scale).to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            dfactor = factor_gradient(low, x, ctx.scale, ctx.dtype, factor.dtype)
        return grad, dx, dfactor, None, None


class Folded(Function):
    """x W^T + b where the factor is a part of W: its columns (dim 1) or rows (dim 0) I.

    Saves W as it is, and for the factor's gradient x[..., I] (FA) or x (FB), each only if needed;
    what x can be computed from again in place of x, if its origin is given.
    Its gradients are correct in first order alone, and asking for the second order is an error: W
    does not know that it depends on the factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        scale: float,
        dim: int,
        origin: Origin | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        needs_x, needs_factor = ctx.needs_input_grad[:2]
        ctx.scale, ctx.dim, ctx.dtypes = scale, dim, (x.dtype, factor.dtype)
        ctx.recall = None
        kept: tuple[Tensor | None, ...] = ()
        if needs_factor and dim == 1:
            # The columns are a copy in any case: in the GEMM's dtype it is the smaller one.
            kept = (gathered(x, indices, y.dtype),)
        elif needs_factor and origin is not None:
            origin.recall.add_reader()
            ctx.recall, kept = origin.recall, origin.inputs
        elif needs_factor:
            kept = (x,)
        ctx.save_for_backward(weight if needs_x else None, indices, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, indices, *kept = ctx.saved_tensors
        dtype, factor_dtype = ctx.dtypes
        dx = dfactor = None
        if kept:  # first: its memory is free again for the larger dx
            x = kept[0] if ctx.recall is None else ctx.recall.output(*kept)
            rows = grad if ctx.dim == 1 else gathered(grad, indices, grad.dtype)
            dfactor = factor_gradient(rows, x, ctx.scale, grad.dtype, factor_dtype)
            del x
        if weight is not None:
            dx = (grad @ weight.to(grad.dtype)).to(dtype)
        return dx, dfactor, None, None, None, None, None, None


def factor_gradient(
    grad: Tensor, x: Tensor, scale: float, dtype: torch.dtype, to: torch.dtype
) -> Tensor:
    """scale · grad^T x over all tokens, (out, in): the factors in `dtype`, the result in `to`.

    On a GPU a product of halves is not rounded to a half before it is scaled, and lies contiguous:
    as a leaf's gradient it is taken over without a copy.
    """
    product = _over_tokens(flat(grad), flat(x).to(dtype))
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    return (wide if scale == 1.0 else wide * scale).to(to)


def _over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, (n, m)."""
    if _widens(left) and left.dtype in HALVES:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    if left.is_cuda:
        return left.T @ right
    # On a CPU the GEMM is up to three times faster with the narrow side on the left.
    if left.shape[1] > right.shape[1]:
        return _over_tokens(right, left).T
    if len(left) >= MANY and len(left) % PARTS == 0 and left.dtype in FULL:
        # And again half as fast: each thread then reads its own tokens.
        parts = (x.unflatten(0, (PARTS, -1)) for x in (left, right))
        return torch.bmm(next(parts).mT, next(parts)).sum(0)
    return left.T @ right


def _widens(tensor: Tensor) -> bool:
    """Whether a GEMM of halves can give fp32 here; compiled code joins the cast to it anyway."""
    return tensor.is_cuda and torch.version.hip is None and not torch.compiler.is_compiling()


def flat(x: Tensor) -> Tensor:
    """(tokens, width) of (..., width)."""
    return x.reshape(-1, x.shape[-1])


def _plus_product(y: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """y + a b in `dtype`, a (..., n) and b (n, m); without a `y`, the product alone."""
    if y is None:
        return (a @ b).to(dtype)
    if a.dtype == y.dtype and y.dtype in FULL:
        return torch.addmm(flat(y), flat(a), b).reshape(y.shape)
    return y + (a @ b).to(dtype)
