"""The strips of weights, that is the columns or rows that updates own, read and written.

Each launch costs a GPU's driver more than copying a strip: there one kernel copies those of many
weights, which finds them by a table of addresses. Elsewhere, and where Triton does not work, each
strip is an `index_select` or an `index_copy_`. The bytes are the same.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

KINDS = ("cuda",)
"""Kinds of devices that have the kernels."""
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an entry → the whole numbers that stand for it."""

MANY = 1 << 14
"""Entries from which on a CPU takes half the time for a `gather` of an `index_select`'s."""

_WORKS: dict[Any, bool] = {}
"""Kernels that were tried: do they compile and run here?"""


class Strips:
    """Columns (dim 1) or rows (dim 0) of several weights of one type on one device.

    Their entries are passed as one flat tensor: the strips one after another, each contiguous, of
    shape (out, r) or (r, in). An instance is for as long as the weights lie where they do.

    Args:
        weights: (out, in) each.
        indices: int64 (r,) each, on the weights' device; or (weights, r).
    """

    def __init__(
        self,
        dim: int,
        weights: Sequence[Tensor],
        indices: Sequence[Tensor] | Tensor,
    ) -> None:
        self.dim, self.weights, self._indices = dim, weights, indices
        if isinstance(indices, Tensor):
            ranks = (indices.shape[1],) * len(weights)
        else:
            ranks = tuple(len(at) for at in indices)
        self._layout = _layout(dim, tuple(weight.shape for weight in weights), ranks)
        self._table: Tensor | None = None
        if self._by_kernel():
            joint = indices if isinstance(indices, Tensor) else torch.cat(list(indices))
            self._joint = joint.reshape(-1)
            addresses = tuple(weight.data_ptr() for weight in weights)
            self._table = _table(self._layout, addresses, weights[0].device)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of the strips."""
        return self._layout.shapes

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor for all entries, in the weights' type unless another one is given."""
        return self.weights[0].new_empty(self._layout.size, dtype=dtype)

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Each strip of a flat tensor."""
        if self.shapes.count(self.shapes[0]) == len(self.shapes):
            return flat.view(-1, *self.shapes[0]).unbind()
        parts = flat.view(-1).split(self._layout.counts)
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    @torch.no_grad()
    def read(self) -> Tensor:
        """All entries, flat."""
        flat = self.empty()
        if self._table is not None:
            self._launch(flat, write=False)
        else:
            each = zip(self.weights, self._each(), self.views(flat), strict=True)
            for weight, at, view in each:
                torch.index_select(weight, self.dim, at, out=view)
        return flat

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Put all entries into the weights; an interrupt leaves some of the strips unwritten."""
        if self._table is not None:
            self._launch(flat, write=True)
            increment_version(self.weights)  # as any write in place does
        else:
            each = zip(self.weights, self._each(), self.views(flat), strict=True)
            for weight, at, view in each:
                weight.index_copy_(self.dim, at, view)

    def _each(self) -> Sequence[Tensor]:
        return self._indices.unbind() if isinstance(self._indices, Tensor) else self._indices

    def _by_kernel(self) -> bool:
        weight = self.weights[0]
        if len(self.weights) == 1 or not self._layout.size or not _may_launch(weight):
            return False
        if capturing(weight.device):
            return False
        return all(map(_is_plain, self.weights)) and _works(
            (weight.device, weight.element_size(), self.dim), lambda: _try_copy(weight, self.dim)
        )

    def _launch(self, flat: Tensor, write: bool) -> None:
        from sbora_diffusion.core.kernels import copy_strips

        assert (
            self._table is not None and flat.is_contiguous() and flat.numel() == self._layout.size
        )
        assert flat.dtype == self.weights[0].dtype and flat.device == self._table.device
        whole = flat.view(WHOLE[flat.element_size()])
        with on_device(flat.device):
            copy_strips(
                self._table, self._joint, whole, max(self._layout.counts), self.dim == 1, write
            )


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where strips stand in their flat tensor.

    Attributes:
        counts: entries of each strip.
        fields: of each strip in the table of `kernels.copy_strips`, without the address.
        size: entries of all strips.
    """

    shapes: tuple[tuple[int, int], ...]
    counts: list[int]
    fields: tuple[tuple[int, ...], ...]
    size: int


@lru_cache(maxsize=32)
def _layout(dim: int, sizes: tuple[torch.Size, ...], ranks: tuple[int, ...]) -> _Layout:
    """Of strips of so many columns or rows of weights of these sizes (out, in)."""
    pairs = zip(sizes, ranks, strict=True)
    shapes = tuple((rows, r) if dim == 1 else (r, columns) for (rows, columns), r in pairs)
    counts = [rows * columns for rows, columns in shapes]
    fields = zip(
        [columns for _, columns in sizes],
        accumulate([0, *counts[:-1]]),
        counts,
        [columns for _, columns in shapes],
        accumulate([0, *ranks[:-1]]),
        strict=True,
    )
    return _Layout(shapes, counts, tuple(fields), sum(counts))


@lru_cache(maxsize=32)
def _table(layout: _Layout, addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The table of `kernels.copy_strips`."""
    rows = zip(addresses, layout.fields, strict=True)
    table = torch.tensor([(address, *fields) for address, fields in rows], dtype=torch.int64)
    return table.to(device)


def gathered(x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """x[..., indices] in another type; the indices int64 (r,).

    A kernel of our own takes half the time of an `index_select` on the GPU and more of the CPU's
    for its launch, which a recording does without: there it is used, if it was tried before.
    """
    if _may_launch(x):
        kind = x.device, x.dtype, dtype
        if not capturing(x.device):
            _works(kind, lambda: _gathered(x.new_zeros(2, 2), indices.new_zeros(1), dtype))
        elif _WORKS.get(kind) and _is_small(x, indices):
            return _gathered(x, indices, dtype)
    elif x.device.type == "cpu" and x.shape[:-1].numel() * len(indices) >= MANY:
        return x.gather(-1, indices.expand(*x.shape[:-1], -1)).to(dtype)
    return x.index_select(-1, indices).to(dtype)


def capturing(device: torch.device) -> bool:
    """Is the device's work being recorded?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _gathered(x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    from sbora_diffusion.core.kernels import gather_columns

    found = x.new_empty((*x.shape[:-1], len(indices)), dtype=dtype)
    with on_device(x.device):
        gather_columns(x.view(-1, x.shape[-1]), indices, found.view(-1, len(indices)))
    return found


def _is_small(x: Tensor, indices: Tensor) -> bool:
    """Does x lie as the kernel reads it, and can its entries be counted in 32 bits?"""
    return x.is_contiguous() and 0 < x.numel() < 1 << 31 and 0 < len(indices) <= x.shape[-1]


def _may_launch(tensor: Tensor) -> bool:
    return tensor.device.type in KINDS and not torch.compiler.is_compiling()


def _is_plain(weight: Tensor) -> bool:
    """Do the entries lie row by row at the address, with nothing in between that should know?"""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()
    return plain and not weight.is_inference()


def _works(kind: Any, attempt: Callable[[], object]) -> bool:
    """Whether a kernel compiles and runs, found out once; no recording takes a first launch."""
    if kind not in _WORKS:
        try:
            attempt()
        except Exception:  # Triton, its compiler or the GPU's generation: many kinds of errors
            _WORKS[kind] = False
        else:
            _WORKS[kind] = True
    return _WORKS[kind]


def _try_copy(weight: Tensor, dim: int) -> None:
    from sbora_diffusion.core.kernels import COUNT, FIELDS, copy_strips

    nothing = weight.new_ones((1, FIELDS), dtype=torch.int64)
    nothing[:, COUNT] = 0
    flat = weight.new_zeros(1).view(WHOLE[weight.element_size()])
    with on_device(weight.device):
        for write in (False, True):
            copy_strips(nothing, nothing, flat, 1, dim == 1, write)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within, this is the current device, on which Triton launches and graphs are recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
