"""Kernels for NVIDIA and AMD GPUs, in Triton; imported by `strips` alone, and only where they run.

They move entries and change none but by a cast; whole numbers stand for types of the same size.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of one program."""
FIELDS = 6
"""Numbers of a strip in the table of `copy_strips`."""
COUNT = 3
"""Which of them is the number of its entries."""


def copy_strips(
    table: Tensor, indices: Tensor, flat: Tensor, largest: int, columns: bool, write: bool
) -> None:
    """Copy strips of many matrices into a flat tensor, or back, in one launch.

    Args:
        table: (strips, FIELDS) int64: address of the matrix, entries in one of its rows, first
            entry of the strip in `flat`, entries of the strip and in one of its rows, first index.
        indices: int64, of all strips one after another.
        flat: of whole numbers as large as the matrices' entries.
        largest: entries of the largest strip.
        columns: are the strips columns, or rows?
        write: into the matrices?
    """
    grid = len(table), triton.cdiv(largest, BLOCK)
    _copy_strips[grid](table, indices, flat, columns, write, BLOCK)


def gather_columns(x: Tensor, indices: Tensor, found: Tensor) -> None:
    """found = x[:, indices], cast: x (n, width) and found (n, r) contiguous and with fewer than 2³¹
    entries found, indices int64."""
    grid = (triton.cdiv(found.numel(), BLOCK),)
    _gather_columns[grid](x, indices, found, x.shape[1], found.shape[1], found.numel(), BLOCK)


POINTERS = ["table", "indices", "flat"]


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def _copy_strips(
    table, indices, flat, COLUMNS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    strip = table + tl.program_id(0) * 6
    matrix = tl.load(strip).to(tl.pointer_type(flat.dtype.element_ty))
    width, first, count = tl.load(strip + 1), tl.load(strip + 2), tl.load(strip + 3)
    breadth, at = tl.load(strip + 4).to(tl.int32), indices + tl.load(strip + 5)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    row, column = offset // breadth, offset % breadth
    if COLUMNS:
        entry = row * width + tl.load(at + column, mask=inside, other=0)
    else:
        entry = tl.load(at + row, mask=inside, other=0) * width + column
    if WRITE:
        tl.store(matrix + entry, tl.load(flat + first + offset, mask=inside), mask=inside)
    else:
        tl.store(flat + first + offset, tl.load(matrix + entry, mask=inside), mask=inside)


SIZES = ["width", "rank", "count"]


@triton.jit(
    do_not_specialize=SIZES, do_not_specialize_on_alignment=["x", "indices", "found", *SIZES]
)
def _gather_columns(x, indices, found, width, rank, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    column = tl.load(indices + offset % rank, mask=inside, other=0)
    row = (offset // rank).to(tl.int64)
    value = tl.load(x + row * width + column, mask=inside)
    tl.store(found + offset, value.to(found.dtype.element_ty), mask=inside)
