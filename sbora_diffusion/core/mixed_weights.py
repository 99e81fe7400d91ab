"""Mixed batches without a second path: each row multiplies by a folded weight of its own.

One batched product takes the place of the layer's product, gather, batched GEMM and scatter-add.
The weights are made once and serve all steps of drawing; while factors are trained they would
change with each step, so that training takes two paths.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sbora_diffusion.core.mixed import Bank
from sbora_diffusion.core.tuner.folded import base_obstacle

FOLD_FROM = 64
"""Tokens that each weight must serve in a call: for fewer, reading all weights costs more than the
second path does."""
FREE_SHARE = 0.25
"""Of a GPU's free memory, how much the weights of all layers together may take."""
HOST_BYTES = 1 << 30
"""What they may take elsewhere."""

Room = Callable[[Sequence[Tensor]], Sequence[Tensor]]
""" (tensors, perhaps expanded) → tensors of these shapes, to be written to."""


def new_room(like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of their own for each of these; where a `like` is expanded, the result is not."""
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in like]


@torch.no_grad()
def folded_weights(
    layers: Mapping[str, nn.Module],
    banks: Mapping[str, Sequence[Bank]],
    rows: Tensor | None = None,
    room: Room = new_room,
    held: int = 0,
) -> dict[str, Tensor]:
    """What `mixed_rows` multiplies by in place of two paths; empty where memory is short.

    There is one weight for each row, not for each entry: a batched product wants them in the
    order of the rows, and as many of them for every choice of concepts.

    Args:
        layers, banks, rows: as for `mixed_rows`.
        room: where the weights are put.
        held: bytes that `room` holds already, and gives again or drops.

    Returns:
        Canonical name → (B, out, in), or (C, out, in) without `rows`; layers that are not plain
        are left out. They hold the layers' weights of this moment.
    """
    plain = {name: parts for name, parts in banks.items() if _is_plain(layers[name])}
    like = [
        _weight(layers[name]).expand(len(_chosen(parts[0].indices, rows)), -1, -1)
        for name, parts in plain.items()
    ]
    if not like or sum(one.nbytes for one in like) > _limit(like[0].device, held):
        return {}
    weights = dict(zip(plain, room(like), strict=True))
    for name, parts in plain.items():
        own = parts if rows is None else [bank.select(rows) for bank in parts]
        fold_rows(_weight(layers[name]), own, weights[name])
    return weights


@torch.no_grad()
def fold_rows(weight: Tensor, banks: Sequence[Bank], out: Tensor) -> None:
    """Write cast(fp32(W0) + Σ scale · Δ) for each entry, rounded once: the bytes that
    `core.merging.fold` makes of the entry's updates.

    The sum is dense, so that FA and FB, and concepts that share indices, need no case of their own;
    the order of three or more summands in one place is open on a GPU. An index with scale 0, such
    as padding, changes nothing.

    Args:
        weight: W0, (out, in); only read.
        banks: at most one for each variant, with one entry for each weight that is made.
        out: (C, out, in), in the dtype of W0.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Adding −0 keeps every number's bytes, +0 would make a −0 of W0 a +0, as `fold` does where it
    # writes: hence −0 for what is not touched, and +0.0 for what is.
    total = torch.full(out.shape, -0.0, dtype=dtype, device=out.device)
    for bank in banks:
        across, along = (1, 2) if bank.variant == "fa" else (2, 1)
        scale = bank.scale.unsqueeze(across)
        part = torch.where(scale == 0.0, -0.0, bank.factor.to(dtype) * scale + 0.0)
        total.scatter_add_(along, bank.indices.unsqueeze(across).expand_as(part), part)
    out.copy_(total.add_(weight))


def serves(weights: Tensor, x: Tensor, halves: int) -> bool:
    """Whether one batched product is right for this input, and pays."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    tokens = x.shape[:-1].numel() // (halves * len(weights))
    return x.dtype == weights.dtype and tokens >= FOLD_FROM


def linear_rows(x: Tensor, weights: Tensor, bias: Tensor | None, halves: int = 1) -> Tensor:
    """x times the transpose of each row's own weight, plus the bias; without gradients.

    Args:
        x: (halves · B, ..., in): batches of B rows one after another, all with the same weights.
        weights: (C, out, in), B a multiple of C, whose consecutive rows share one.

    Returns:
        (halves · B, ..., out).
    """
    count, out, in_ = weights.shape
    parts, shape = x.reshape(halves, count, -1, in_), (*x.shape[:-1], out)
    if halves == 1:
        return _product(parts[0], weights, bias).view(shape)
    y = x.new_empty(*parts.shape[:-1], out)
    for part, place in zip(parts, y, strict=True):  # each writes its half: nothing is joined
        _product(part, weights, bias, place)
    return y.view(shape)


def _product(x: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weights.mT, out=out)
    return torch.baddbmm(bias, x, weights.mT, out=out)


def _is_plain(layer: nn.Module) -> bool:
    return base_obstacle(layer) is None


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return layer.weight


def _chosen(indices: Tensor, rows: Tensor | None) -> Tensor:
    return indices if rows is None else rows


def _limit(device: torch.device, held: int) -> float:
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FREE_SHARE * (free + cached + held)
