"""How strongly updates of one layer act on inputs of which only the second moment is known.

For inputs x with G = mean of x xᵀ, the mean of ‖ΔW x‖² is tr(ΔW G ΔWᵀ) = ⟨ΔWᵀΔW, G⟩. ΔW is never
formed: of FA updates only columns are not zero, of FB updates only rows. Everything is fp64.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sbora_diffusion.core.updates import Update, places_in, union_of


class UpdateSum:
    """D = Σ ΔW_q of one layer, as columns and rows; the order of the updates does not matter.

    Args:
        updates: of one layer; those of one variant may share indices.
    """

    def __init__(self, updates: Sequence[Update]):
        ordered = sorted(updates, key=lambda update: update.key)
        self._fa = [update for update in ordered if update.variant == "fa"]
        self._fb = [update for update in ordered if update.variant == "fb"]
        self._columns, self._rows = union_of(self._fa), union_of(self._fb)

    def energy(self, moment: Tensor) -> float:
        """tr(D G Dᵀ), the mean of ‖D x‖²; `moment` is G (in, in)."""
        moment, total = _double(moment), 0.0
        if self._fa:
            total += _inner(self._column_gram, moment[self._columns][:, self._columns])
        if self._fb:
            total += _inner(self._row_gram, moment)
        if self._fa and self._fb:
            crossing = self._by_column[self._rows].T @ self._by_row
            total += 2 * _inner(crossing, moment[self._columns])
        return max(total, 0.0)

    def inner(self, update: Update, moment: Tensor) -> float:
        """tr(D G ΔWᵀ), the mean of ⟨D x, ΔW x⟩, with the ΔW of one update."""
        moment, at, total = _double(moment), update.index(torch.device("cpu")), 0.0
        factor = _scaled(update)
        if update.variant == "fa":
            if self._fa:
                total += _inner(self._by_column @ moment[self._columns][:, at], factor)
            if self._fb:
                total += _inner(self._by_row @ moment[:, at], factor[self._rows])
            return total
        if self._fa:
            total += _inner(self._by_column[at] @ moment[self._columns], factor)
        if self._fb:
            same = (at[:, None] == self._rows).double()  # (r, rows)
            total += _inner(same @ self._by_row @ moment, factor)
        return total

    @cached_property
    def _by_column(self) -> Tensor:
        """(out, columns)."""
        return _added(self._fa, self._columns, dim=1)

    @cached_property
    def _by_row(self) -> Tensor:
        """(rows, in)."""
        return _added(self._fb, self._rows, dim=0)

    @cached_property
    def _column_gram(self) -> Tensor:
        return self._by_column.T @ self._by_column

    @cached_property
    def _row_gram(self) -> Tensor:
        return self._by_row.T @ self._by_row


def weight_energies(weight: Tensor, moments: Sequence[Tensor]) -> list[float]:
    """tr(W G Wᵀ) of a whole weight (out, in) for each G (in, in)."""
    weight = _double(weight)
    gram = weight.T @ weight
    return [max(_inner(gram, _double(moment)), 0.0) for moment in moments]


def _added(updates: Sequence[Update], union: Tensor, dim: int) -> Tensor:
    """The updates' factors where their indices stand among all."""
    first = _scaled(updates[0])
    shape = list(first.shape)
    shape[dim] = len(union)
    total = first.new_zeros(shape)
    for update in updates:
        total.index_add_(dim, places_in(update, union), _scaled(update))
    return total


def _scaled(update: Update) -> Tensor:
    return _double(update.factor) * update.scale


def _inner(one: Tensor, other: Tensor) -> float:
    return (one * other).sum().item()


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()  # not every accelerator has fp64
