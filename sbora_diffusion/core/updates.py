"""One concept's share of one weight: which columns or rows it owns, and where two of them meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.functional import Variant


@dataclass(frozen=True, eq=False)
class Update:
    """One concept's share of one layer.

    Attributes:
        key: the concept's digest; fixes the order of summation.
        variant: "fa" (the indices are columns) or "fb" (rows).
        indices: (r,), distinct, int32 or int64.
        factor: B (out, r) of FA or A (r, in) of FB; not changed while it is folded.
        scale: weight · alpha / rank, see `functional.scaling`.
    """

    key: str
    variant: Variant
    indices: Tensor
    factor: Tensor
    scale: float

    @property
    def dim(self) -> int:
        """The dimension of W0 (out, in) that the indices count."""
        return 1 if self.variant == "fa" else 0

    @cached_property
    def owned(self) -> tuple[int, ...]:
        """The indices as numbers."""
        return tuple(self.indices.tolist())

    @cached_property
    def members(self) -> frozenset[int]:
        """The indices as a set."""
        return frozenset(self.owned)

    def index(self, device: torch.device) -> Tensor:
        """The indices as int64 on a device."""
        return self.indices.to(device, torch.int64)

    def has_place_of(self, other: "Update") -> bool:
        """Do both own the same indices, in the same order?"""
        return self.variant == other.variant and (
            self.indices is other.indices or self.owned == other.owned
        )

    def equals(self, other: "Update") -> bool:
        """Is this the same update? Factors are compared as objects: a copy only costs time."""
        return (
            self.scale == other.scale and self.factor is other.factor and self.has_place_of(other)
        )


class Write(NamedTuple):
    """New entries of some columns (dim 1) or rows (dim 0) of a weight."""

    dim: int
    at: Tensor
    block: Tensor


class Crowd:
    """The updates of one weight, asked for those that meet another one.

    The usual case, a set without overlap, is answered without comparing every pair.
    """

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self._updates = list(updates.values())
        columns = [update for update in self._updates if update.variant == "fa"]
        rows = [update for update in self._updates if update.variant == "fb"]
        self._of_dim = (rows, columns)
        self._owned = tuple(
            frozenset().union(*(u.members for u in of_dim)) for of_dim in self._of_dim
        )
        self._distinct = tuple(
            len(owned) == sum(len(u.owned) for u in of_dim)
            for owned, of_dim in zip(self._owned, self._of_dim, strict=True)
        )

    def near(self, own: Update) -> list[Update]:
        """The updates that touch some entry of the columns or rows of `own`, in their order."""
        same, crossing = self._near_in_dim(own), self._of_dim[1 - own.dim]
        if not crossing:
            return same
        return [update for update in self._updates if update in same or update in crossing]

    def _near_in_dim(self, own: Update) -> list[Update]:
        of_dim, owned = self._of_dim[own.dim], self._owned[own.dim]
        if owned.isdisjoint(own.owned):
            return []
        if self._distinct[own.dim] and own in of_dim:
            return [own]
        return [update for update in of_dim if not update.members.isdisjoint(own.owned)]


def share_of(own: Update, other: Update, values: Tensor) -> Write:
    """Where another's columns or rows fall into those of `own`, and that part of its `values`.

    Args:
        values: in the shape of the other's factor. The two must meet.
    """
    device = values.device
    if other.dim != own.dim:
        part = values.index_select(own.dim, own.index(device))
        return Write(other.dim, other.index(device), part)
    common = sorted(own.members.intersection(other.owned))
    here, there = (torch.tensor([u.owned.index(i) for i in common]) for u in (own, other))
    return Write(own.dim, here.to(device), values.index_select(own.dim, there.to(device)))


def union_of(updates: Sequence[Update]) -> Tensor:
    """All owned indices, ascending, int64 on the CPU."""
    owned = sorted(set().union(*(update.members for update in updates)))
    return torch.tensor(owned, dtype=torch.int64)


def places_in(update: Update, union: Tensor) -> Tensor:
    """Where the update's indices stand among all, (r,) int64."""
    return torch.searchsorted(union, update.index(union.device))


def check_updates(weight: Tensor, updates: Sequence[Update]) -> None:
    """Raise FormatError unless the updates fit a weight (out, in) of floating-point numbers."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(
            f"expected a floating-point weight (out, in), got {weight.dtype} {tuple(weight.shape)}",
            "fold into the unquantized base",
        )
    for update in updates:
        _check_shape(weight, update)


def _check_shape(weight: Tensor, update: Update) -> None:
    rank, width = len(update.owned), weight.shape[update.dim]
    expected = list(weight.shape)
    expected[update.dim] = rank
    if list(update.factor.shape) != expected:
        raise FormatError(
            f"concept {update.key!r}: expected a factor of shape {tuple(expected)} for a weight of "
            f"shape {tuple(weight.shape)}, got {tuple(update.factor.shape)}",
            "use the base that the concept was trained on",
        )
    if len(update.members) != rank or not all(0 <= index < width for index in update.owned):
        raise FormatError(
            f"concept {update.key!r}: expected {rank} distinct indices below {width}, got "
            f"{list(update.owned)}",
            "get the concept file again from its author",
        )
