"""Folding concepts into a weight, exactly: the one expression the whole project uses.

Every entry that a concept touches becomes ``cast(fp32(W0) + Σ scale_i · Δ_i)``: the sum is taken in
fp32 from zero over the concepts in the order of their keys, and rounded once. So the bytes do not
depend on the order of merging, nor on how a set was reached. Nothing is ever subtracted: the
original columns and rows are kept and put back, bit for bit.

An FA and an FB concept in one layer always share r_a · r_b entries; the same rule holds for them,
since each touched entry is computed from its original and from all concepts that touch it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor

from sbora_diffusion.core.errors import ConflictError, FormatError, NonFiniteError
from sbora_diffusion.core.functional import Variant, scaled_factor


@dataclass(frozen=True, eq=False)
class Update:
    """One concept's share of one layer.

    Attributes:
        key: the concept's digest; fixes the order of summation.
        variant: "fa" (the indices are columns) or "fb" (rows).
        indices: (r,), distinct, int32 or int64.
        factor: B (out, r) of FA or A (r, in) of FB.
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


@dataclass(frozen=True, eq=False)
class Originals:
    """What a fold overwrote: the union of its columns (out, c) and of its rows (r, in)."""

    column_indices: Tensor
    columns: Tensor
    row_indices: Tensor
    rows: Tensor


@torch.no_grad()
def fold(weight: Tensor, updates: Sequence[Update]) -> Originals:
    """Fold concepts into an unfolded weight (out, in), in place; the Parameter stays the same.

    Any order of `updates` gives the same bytes. Entries outside the union of their columns and
    rows are not written. On an error the weight is unchanged.

    Returns:
        The overwritten entries, for `restore` and `refold`.

    Raises:
        ConflictError: two updates have one key.
        FormatError: a factor's or the weight's shape or type, or an index, does not fit.
        NonFiniteError: an update, or a folded entry, is not finite; names the keys.
    """
    ordered = _ordered(updates)
    _check(weight, ordered)
    originals = _originals(weight, _union(ordered, 1), _union(ordered, 0))
    columns = _folded(originals.columns, 1, originals.column_indices, ordered)
    rows = _folded(originals.rows, 0, originals.row_indices, ordered)
    _write(weight, originals.column_indices, columns, originals.row_indices, rows)
    return originals


@torch.no_grad()
def restore(weight: Tensor, originals: Originals) -> None:
    """Put the original columns and rows back, in place and bit for bit.

    A weight that was moved or cast since it was folded gets its originals moved or cast.
    """
    _write(
        weight,
        originals.column_indices.to(weight.device),
        originals.columns.to(weight),
        originals.row_indices.to(weight.device),
        originals.rows.to(weight),
    )


@torch.no_grad()
def refold(weight: Tensor, originals: Originals, updates: Sequence[Update]) -> Originals:
    """Replace the folded set by another one: restore, then fold.

    Returns and raises as `fold` does; on an error the weight keeps what it held before the call.
    """
    before = _originals(weight, originals.column_indices, originals.row_indices)
    restore(weight, originals)
    try:
        return fold(weight, updates)
    except Exception:
        restore(weight, before)
        raise


def overlap(updates: Sequence[Update]) -> dict[tuple[str, str], list[int]]:
    """Indices of one layer that two concepts of the same variant both own.

    Returns:
        (smaller key, larger key) to the shared indices, ascending; only pairs that share any.
    """
    shared = {}
    for a, b in combinations(_ordered(updates), 2):
        common = set(a.indices.tolist()) & set(b.indices.tolist())
        if a.variant == b.variant and common:
            shared[a.key, b.key] = sorted(common)
    return shared


def _ordered(updates: Sequence[Update]) -> list[Update]:
    ordered = sorted(updates, key=lambda update: update.key)
    for a, b in pairwise(ordered):
        if a.key == b.key:
            raise ConflictError(f"concept {a.key!r} is given twice", "give each concept once")
    return ordered


def _union(updates: Sequence[Update], dim: int) -> Tensor:
    indices = [update.indices.long().cpu() for update in updates if update.dim == dim]
    return torch.cat(indices).unique() if indices else torch.empty(0, dtype=torch.long)


def _originals(weight: Tensor, columns: Tensor, rows: Tensor) -> Originals:
    columns, rows = columns.to(weight.device), rows.to(weight.device)
    return Originals(columns, weight.index_select(1, columns), rows, weight.index_select(0, rows))


def _folded(original: Tensor, dim: int, kept: Tensor, updates: Sequence[Update]) -> Tensor:
    """cast(fp32(W0) + Σ scale · Δ) on the kept columns (dim 1) or rows (dim 0) of W0."""
    wide = original.to(torch.promote_types(original.dtype, torch.float32))
    total = torch.zeros_like(wide)
    places = []
    for index, delta in _contributions(updates, dim, kept):
        total[index] += delta.to(total)
        places.append(index)
    folded = (wide + total).to(original.dtype)
    if not folded.isfinite().all():
        pairs = zip(updates, places, strict=True)
        guilty = [update for update, index in pairs if not folded[index].isfinite().all()]
        raise _non_finite(guilty, f"the folded weight in {original.dtype}")
    return folded


def _contributions(
    updates: Sequence[Update], dim: int, kept: Tensor
) -> Iterator[tuple[tuple[slice | Tensor, ...], Tensor]]:
    """Where in the kept block each update adds, and what, in the order of the updates."""
    for update in updates:
        delta = scaled_factor(update.factor.detach().to(kept.device), update.scale)
        index: list[slice | Tensor] = [slice(None), slice(None)]
        own = update.indices.long().to(kept.device)
        if update.dim == dim:
            index[dim] = torch.searchsorted(kept, own)
        else:
            index[update.dim] = own
            delta = delta.index_select(dim, kept)
        yield tuple(index), delta


def _write(weight: Tensor, c: Tensor, columns: Tensor, r: Tensor, rows: Tensor) -> None:
    weight.index_copy_(1, c, columns)
    weight.index_copy_(0, r, rows)


def _check(weight: Tensor, updates: Sequence[Update]) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(
            f"expected a floating-point weight (out, in), got {weight.dtype} {tuple(weight.shape)}",
            "fold into the unquantized base",
        )
    for update in updates:
        _check_shape(weight, update)
        if not scaled_factor(update.factor, update.scale).isfinite().all():
            raise _non_finite([update], "its factor")


def _check_shape(weight: Tensor, update: Update) -> None:
    rank, width = update.indices.numel(), weight.shape[update.dim]
    expected = list(weight.shape)
    expected[update.dim] = rank
    if list(update.factor.shape) != expected:
        raise FormatError(
            f"concept {update.key!r}: expected a factor of shape {tuple(expected)} for a weight of "
            f"shape {tuple(weight.shape)}, got {tuple(update.factor.shape)}",
            "use the base that the concept was trained on",
        )
    own = update.indices.tolist()
    if len(set(own)) != rank or not all(0 <= index < width for index in own):
        raise FormatError(
            f"concept {update.key!r}: expected {rank} distinct indices below {width}, got {own}",
            "get the concept file again from its author",
        )


def _non_finite(updates: Sequence[Update], what: str) -> NonFiniteError:
    keys = ", ".join(repr(update.key) for update in updates)
    return NonFiniteError(
        f"concept {keys}: {what} is not finite",
        "lower the concept's weight, or train it again with a lower learning rate",
    )
