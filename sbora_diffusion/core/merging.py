"""Folding concepts into a weight, exactly: the one expression the whole project uses.

Every entry that a concept touches becomes ``cast(fp32(W0) + Σ scale_i · Δ_i)``: the sum is taken in
fp32 from zero over the concepts in the order of their keys, and rounded once. So the bytes do not
depend on the order of merging, nor on how a set was reached. Nothing is ever subtracted: the
original columns and rows are kept and put back, bit for bit.

An FA and an FB concept in one layer always share r_a · r_b entries; the same rule holds for them,
since each touched entry is computed from its original and from all concepts that touch it.

Going from one set to another rebuilds only the columns and rows of updates that come, go or change,
so it costs what these own, not what the weight or the whole set holds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sbora_diffusion.core.errors import ConflictError, NonFiniteError
from sbora_diffusion.core.functional import scaled_factor
from sbora_diffusion.core.strips import Strips
from sbora_diffusion.core.updates import Crowd, Update, Write, check_updates, share_of
from sbora_diffusion.core.writing import Writes, write_all


@dataclass(frozen=True, eq=False)
class Originals:
    """What is folded into a weight, and what that overwrote.

    Attributes:
        updates: key to update, in the order of the keys.
        blocks: key to the unfolded weight's entries in its columns (out, r) or rows (r, in).
    """

    updates: Mapping[str, Update] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)


Crowded = tuple[Update, Tensor, list[Update]]
"""An update, the original entries that it owns, and all updates that touch these."""
Place = tuple[int, int, int]
"""Dimension, first index and number of indices in a block."""


@dataclass(frozen=True, eq=False)
class Change:
    """A computed step from one folded set to another that `commit` writes.

    Attributes:
        originals: what holds once it is written.
    """

    weight: Tensor
    writes: tuple[Write, ...]
    originals: Originals


@torch.no_grad()
def prepare(weight: Tensor, originals: Originals, updates: Sequence[Update]) -> Change:
    """Compute the step to another set of updates; the weight is only read.

    Any order of `updates` gives the same bytes. A weight that was moved or cast since it was folded
    gets its originals moved or cast, and all of the set folded anew.

    Args:
        weight: (out, in), with the set of `originals` folded into it.
        originals: empty for an unfolded weight.

    Raises:
        ConflictError: two updates have one key.
        FormatError: a factor's or the weight's shape or type, or an index, does not fit.
        NonFiniteError: an update, or a folded entry, is not finite; names the keys.
    """
    wanted = {update.key: update for update in _ordered(updates)}
    before, cast = _at(weight, originals)
    kept = set() if cast else _kept(before.updates, wanted)
    new = [update for update in wanted.values() if update.key not in kept]
    check_updates(weight, new)
    blocks = {key: before.blocks[key] for key in kept} | _originals(weight, new, before)
    gone = [update for update in before.updates.values() if not _stays(update, wanted)]
    crowd, writes = Crowd(wanted), []
    for dim in (0, 1):
        changed = [(u, blocks[u.key]) for u in new if u.dim == dim]
        changed += [(u, before.blocks[u.key]) for u in gone if u.dim == dim]
        writes += _rebuilt(dim, changed, crowd)
    return Change(weight, tuple(writes), Originals(wanted, blocks))


def commit(changes: Iterable[Change]) -> None:
    """Write prepared steps in place, all of them: what interrupts this, undoes it too."""
    write_all(write for change in changes for write in change_writes(change))


def change_writes(change: Change) -> Iterator[Writes]:
    """A change as `write_all` takes it; what was there is read right before it is written."""
    for dim, at, block in change.writes:
        # Reading first also makes writing faster: strided entries are then in the cache.
        strips = Strips(dim, (change.weight,), (at,))
        yield Writes(strips, block, strips.read())


def fold(weight: Tensor, updates: Sequence[Update]) -> Originals:
    """Fold concepts into an unfolded weight (out, in), in place; the Parameter stays the same.

    Entries outside the union of their columns and rows are not written.

    Returns:
        The overwritten entries, for `restore` and `refold`.

    Raises:
        What `prepare` raises; the weight is unchanged then.
    """
    return refold(weight, Originals(), updates)


def restore(weight: Tensor, originals: Originals) -> None:
    """Put the original columns and rows back, in place and bit for bit."""
    refold(weight, originals, ())


def refold(weight: Tensor, originals: Originals, updates: Sequence[Update]) -> Originals:
    """Replace the folded set by another one, in place.

    Returns and raises as `fold` does; on an error the weight keeps what it held before the call.
    """
    change = prepare(weight, originals, updates)
    commit([change])
    return change.originals


def folded_alone(scaled: Tensor, original: Tensor) -> Tensor:
    """The entries of an update that meets no other one: cast(fp32(W0) + (0 + scale · Δ)).

    Args:
        scaled: scale · Δ in at least fp32; overwritten.
    """
    return _rounded(scaled.add_(0.0), original)  # summing from zero makes a −0 a +0


def _rounded(total: Tensor, original: Tensor) -> Tensor:
    """cast(fp32(W0) + total); overwrites the total."""
    return total.add_(original).to(original.dtype)


def _ordered(updates: Sequence[Update]) -> list[Update]:
    ordered = sorted(updates, key=lambda update: update.key)
    for a, b in pairwise(ordered):
        if a.key == b.key:
            raise ConflictError(f"concept {a.key!r} is given twice", "give each concept once")
    return ordered


def _at(weight: Tensor, originals: Originals) -> tuple[Originals, bool]:
    """The originals where and as the weight is now, and whether it was cast since."""
    old = next(iter(originals.blocks.values()), weight)
    if (old.dtype, old.device) == (weight.dtype, weight.device):
        return originals, False
    blocks = {key: block.to(weight) for key, block in originals.blocks.items()}
    return Originals(originals.updates, blocks), old.dtype != weight.dtype


def _kept(before: Mapping[str, Update], wanted: Mapping[str, Update]) -> set[str]:
    return {key for key in before.keys() & wanted.keys() if before[key].equals(wanted[key])}


def _stays(update: Update, wanted: Mapping[str, Update]) -> bool:
    return update.key in wanted and wanted[update.key].has_place_of(update)


def _originals(weight: Tensor, new: list[Update], before: Originals) -> dict[str, Tensor]:
    """The unfolded weight's entries that updates own, although others may be folded there."""
    crowd = Crowd(before.updates)
    blocks = {u.key: before.blocks[u.key] for u in new if _stays(u, before.updates)}
    for dim in (0, 1):
        unknown = [update for update in new if update.dim == dim and update.key not in blocks]
        if unknown:
            together = weight.detach().index_select(dim, _at_all(unknown, weight.device))
            sizes = [len(update.owned) for update in unknown]
            for update, block in zip(unknown, together.split(sizes, dim), strict=True):
                blocks[update.key] = block.contiguous()
            for update in unknown:
                for other in crowd.near(update):
                    share = share_of(update, other, before.blocks[other.key])
                    blocks[update.key].index_copy_(share.dim, share.at, share.block)
    return blocks


def _rebuilt(dim: int, changed: list[tuple[Update, Tensor]], crowd: Crowd) -> list[Write]:
    """New entries for all that some updates own: cast(fp32(W0) + Σ scale · Δ) where the crowd
    touches them, else W0."""
    met = [(own, block, crowd.near(own)) for own, block in changed]
    crowded = [triple for triple in met if triple[2]]
    free = [(own, block) for own, block, near in met if not near]
    writes = []
    if free:
        block = torch.cat([block for _, block in free], dim)
        writes.append(Write(dim, _at_all([own for own, _ in free], block.device), block))
    if crowded:
        at = _at_all([own for own, *_ in crowded], crowded[0][1].device)
        writes.append(Write(dim, at, _summed(dim, crowded)))
    return writes


def _summed(dim: int, crowded: list[Crowded]) -> Tensor:
    original = torch.cat([block for _, block, _ in crowded], dim)
    total = torch.zeros_like(original, dtype=torch.promote_types(original.dtype, torch.float32))
    for place, own, near in _places(dim, crowded):
        for update in near:
            _add(own, update, total.narrow(*place))
    folded = _rounded(total, original)
    if not all(own in near for own, _, near in crowded):
        folded = torch.where(_touched(original, dim, crowded), folded, original)
    if not math.isfinite(folded.sum(dtype=torch.float32)):
        _refuse_non_finite(folded, dim, crowded)
    return folded


def _places(dim: int, crowded: list[Crowded]) -> Iterator[tuple[Place, Update, list[Update]]]:
    """Where in the joint block each one's own columns or rows stand, and who meets it there."""
    offset = 0
    for own, _, near in crowded:
        yield (dim, offset, len(own.owned)), own, near
        offset += len(own.owned)


def _add(own: Update, other: Update, total: Tensor) -> None:
    factor = other.factor.detach().to(total.device)
    if own.has_place_of(other):
        total.add_(scaled_factor(factor, other.scale).to(total))
    else:
        share = share_of(own, other, factor)
        total.index_add_(share.dim, share.at, scaled_factor(share.block, other.scale).to(total))


def _touched(joint: Tensor, dim: int, crowded: list[Crowded]) -> Tensor:
    touched = torch.zeros_like(joint, dtype=torch.bool)
    for place, own, near in _places(dim, crowded):
        for update in near:
            share = share_of(own, update, update.factor)
            touched.narrow(*place).index_fill_(share.dim, share.at.to(joint.device), True)
    return touched


def _at_all(updates: list[Update], device: torch.device) -> Tensor:
    return torch.cat([update.indices for update in updates]).to(device, torch.int64)


def _refuse_non_finite(folded: Tensor, dim: int, crowded: list[Crowded]) -> None:
    """Name the updates to blame; there are none if but the sum of all entries overflowed."""
    blamed: dict[str, Update] = {}
    for place, own, near in _places(dim, crowded):
        for update in near:
            share = share_of(own, update, update.factor)
            touched = folded.narrow(*place).index_select(share.dim, share.at.to(folded.device))
            if not touched.isfinite().all():
                blamed[update.key] = update
    guilty = list(blamed.values())
    factors = [u for u in guilty if not scaled_factor(u.factor, u.scale).isfinite().all()]
    if guilty:
        what = "its factor" if factors else f"the folded weight in {folded.dtype}"
        keys = ", ".join(repr(update.key) for update in factors or guilty)
        raise NonFiniteError(
            f"concept {keys}: {what} is not finite",
            "lower the concept's weight, or train it again with a lower learning rate",
        )
