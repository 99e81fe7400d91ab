"""Ranges of the library for the length of a training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sbora_diffusion.library import Entry, Library, Reservation


@dataclass(frozen=True)
class Held:
    """Ranges that trainings hold.

    Attributes:
        ranges: name of the concept → its range.
        finished: names that keep theirs whatever happens to the others.
    """

    ranges: Mapping[str, Reservation]
    finished: set[str] = field(default_factory=set)


@contextmanager
def reserved(
    library: Library,
    base: str,
    variant: str,
    names: Sequence[str],
    rank: int,
    widths: Mapping[str, int],
    slots: Mapping[str, int] | None = None,
) -> Iterator[Held]:
    """A range for each name, all handed out at once; on an exception those that are not finished
    get their former state back.

    Args:
        base: key of the base model.
        widths: see `Library.reserve`.
        slots: name → explicit slot, for those that have one.

    Raises:
        CapacityError, ConfigError: none is reserved.
    """
    with library.together() as joined:
        before = {name: entry_of(joined, base, variant, name) for name in names}
        chosen = slots or {}
        ranges = {
            name: joined.reserve(base, variant, name, rank, widths, chosen.get(name))
            for name in names
        }
    held = Held(ranges)
    try:
        yield held
    except BaseException:
        open_ = {n: before[n] for n in names if ranges[n].registered and n not in held.finished}
        with library.together() as joined:
            _restore(joined, base, variant, open_, widths)
        raise


def entry_of(library: Library, base: str, variant: str, name: str) -> Entry | None:
    """What the library knows of a concept."""
    entries = library.concepts(base)
    return next((e for e in entries if (e.variant, e.name) == (variant, name)), None)


def _restore(
    library: Library,
    base: str,
    variant: str,
    before: Mapping[str, Entry | None],
    widths: Mapping[str, int],
) -> None:
    now = {name: entry_of(library, base, variant, name) for name in before}
    moved = [name for name in before if _range(now[name]) != _range(before[name])]
    for name in moved:  # all of them first: one may have the former range of another
        if now[name]:
            library.remove(name, base, variant)
    for name in moved:
        if old := before[name]:
            library.reserve(base, variant, name, old.rank, widths, old.slot)
            if old.path and old.digest:
                library.record(base, variant, name, old.path, old.digest, old.token)


def _range(entry: Entry | None) -> tuple[int, int] | None:
    return (entry.start, entry.stop) if entry else None
