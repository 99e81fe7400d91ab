"""Writing into weights in place: all of it or nothing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Writes(NamedTuple):
    """Entries of several weights, one of each list for each weight.

    Attributes:
        dim: 0 for rows, 1 for columns.
        was: what the entries were before.
    """

    dim: int
    weights: Sequence[Tensor]
    at: Sequence[Tensor]
    blocks: Sequence[Tensor]
    was: Sequence[Tensor]


@torch.no_grad()
def write_all(writes: Iterable[Writes]) -> None:
    """Write entries of weights in place, all of them: what interrupts this, undoes it too."""
    undo: list[tuple[int, Tensor, Tensor, Tensor]] = []
    try:
        for dim, *entries in writes:
            for weight, at, block, was in zip(*entries, strict=True):
                undo.append((dim, weight, at, was))
                weight.index_copy_(dim, at, block)
    except BaseException:
        for dim, weight, at, was in reversed(undo):
            weight.index_copy_(dim, at, was)
        raise
