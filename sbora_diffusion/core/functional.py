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

Where the trained columns or rows can live in the weight itself, `folded_linear` does without a
second path: the frozen layer's two GEMMs and the gradient of the factor are all that is left.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sbora_diffusion.core.gradients import (
    AddProduct,
    Folded,
    Project,
    ScatterAdd,
    Take,
    scaled_factor,
)
from sbora_diffusion.core.recalled import origin_of

Variant = Literal["fa", "fb"]
VARIANTS: tuple[Variant, ...] = ("fa", "fb")


def scaling(alpha: float, rank: int, weight: float = 1.0) -> float:
    """scale = weight · alpha / rank; the one place that fixes the order of the two roundings."""
    return weight * (alpha / rank)


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
    _, columns = branch("fa", x, factor, indices, scale, dropout, generator)
    return join("fa", y, columns, factor, indices, scale)


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
    _, rows = branch("fb", x, factor, indices, scale, dropout, generator)
    return join("fb", y, rows, factor, indices, scale)


SBORA = {"fa": sbora_fa, "fb": sbora_fb}
"""Variant to map."""


def branch(
    variant: Variant,
    x: Tensor,
    factor: Tensor,
    indices: Tensor,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of the second path before the base layer; `join` is the part after it.

    Arguments as for `sbora_fa` and `sbora_fb`. A base layer that reads the returned x saves the
    backward pass an addition of two gradients of its size.

    Returns:
        x itself, and what goes to `join`, (..., r): the gathered columns or the products.
    """
    if variant == "fa":
        through, columns = Take.apply(x, indices)
        return through, _dropped(columns, dropout, generator)
    dropped = _dropped(x, dropout, generator)
    through, rows = Project.apply(dropped, factor, scale, compute_dtype(x, factor))
    # Autograd would ask the base layer for the gradient of an x that needs none.
    return through if dropped is x and x.requires_grad else x, rows


def join(
    variant: Variant, y: Tensor, part: Tensor, factor: Tensor, indices: Tensor, scale: float
) -> Tensor:
    """y with the second path added, (..., out), out of place: y may be kept by a hook."""
    if variant == "fa":
        return AddProduct.apply(y, part, factor, scale, compute_dtype(part, factor))
    return ScatterAdd.apply(y, part.to(y.dtype), indices)


def folded_linear(
    variant: Variant,
    x: Tensor,
    factor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    scale: float,
) -> Tensor:
    """x weight^T + bias, one GEMM, for a weight whose columns or rows I hold W0 + scale · factor.

    The factor takes no part in the forward pass and gets its gradient, scale · dy^T x[..., I] (FA)
    or scale · dy[..., I]^T x (FB), from the backward pass. Weight and bias get none.

    Args:
        x: (..., in). FB keeps it for the backward pass, unless `recalled` can compute it again.
        factor: B (out, r) or A (r, in), already folded into the weight.
        weight: (out, in); must not change between forward and backward pass.
        indices: I, (r,), distinct, int32 or int64.

    Returns:
        (..., out), the bytes that the merged model gives.
    """
    dim, origin = (1, None) if variant == "fa" else (0, origin_of(x))
    return Folded.apply(x, factor, weight, bias, indices, scale, dim, origin)


def delta_weight(
    variant: Variant, factor: Tensor, indices: Tensor, shape: tuple[int, int], scale: float
) -> Tensor:
    """ΔW, dense: (out, in) = shape, in at least fp32, exactly zero outside the indices."""
    scaled = scaled_factor(factor, scale)
    return scaled.new_zeros(shape).index_copy(1 if variant == "fa" else 0, indices.long(), scaled)


def one_hot(indices: Tensor, width: int) -> Tensor:
    """The fixed factor, dense: (r, width) with one 1 a row; A of FA, B^T of FB."""
    return F.one_hot(indices.long(), width)


def compute_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    """The dtype that a product with the trained factor is taken in; see the module's text."""
    widest = torch.promote_types(x.dtype, factor.dtype)
    if torch.is_autocast_enabled(x.device.type) and widest != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return widest


def _dropped(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    if p == 0.0:
        return x
    keep = torch.empty_like(x, requires_grad=False).bernoulli_(1.0 - p, generator=generator)
    return x * (keep / (1.0 - p))
