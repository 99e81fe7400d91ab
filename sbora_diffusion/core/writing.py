"""Writing into weights in place: all of it or nothing."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sbora_diffusion.core.strips import Strips


class Writes(NamedTuple):
    """New entries of strips, as `Strips.write` takes them.

    Attributes:
        was: what the entries were before.
    """

    strips: Strips
    new: Tensor
    was: Tensor


@torch.no_grad()
def write_all(writes: Iterable[Writes]) -> None:
    """Write entries of weights in place, all of them: what interrupts this, undoes it too."""
    undo: list[Writes] = []
    try:
        for one in writes:
            undo.append(one)
            one.strips.write(one.new)
    except BaseException:
        for one in reversed(undo):
            one.strips.write(one.was)
        raise
