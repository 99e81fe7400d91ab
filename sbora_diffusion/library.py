"""The concepts known on this machine: who owns which range, and where the files are (SQLite).

One row is one concept of one base and one variant. Ranges are handed out in one write transaction,
so that two trainings that start at the same moment never get the same indices.
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.core.errors import CapacityError, ConfigError
from sbora_diffusion.core.layers import narrowest
from sbora_diffusion.library_file import transaction

EXAMPLES = Path(__file__).parent / "pocket" / "examples"
"""Concepts of the pocket base that the package brings along."""
_COLUMNS = "base, variant, name, start, stop, path, digest, token"


@dataclass(frozen=True)
class Reservation:
    """A range of indices for one training.

    Attributes:
        registered: False when an explicit slot belongs to another concept; the library then
            knows nothing of this training, and its concept cannot be merged with that other one.
    """

    start: int
    stop: int
    slot: int
    registered: bool


@dataclass(frozen=True)
class Entry:
    """One known concept; path, digest and token are None until its training has ended."""

    base: str
    variant: str
    name: str
    start: int
    stop: int
    path: str | None
    digest: str | None
    token: str | None

    @property
    def rank(self) -> int:
        return self.stop - self.start

    @property
    def slot(self) -> int:
        return self.start // self.rank


class Library:
    """A library file; it is created on the first reservation.

    Args:
        path: the SQLite file, `default_path()` if not given.

    Every method raises FormatError when the file is not a library, and ResourceError when it
    cannot be opened, written or locked.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()

    def reserve(
        self,
        base: str,
        variant: str,
        name: str,
        rank: int,
        widths: Mapping[str, int],
        slot: int | None = None,
        allow_overlap: bool = False,
    ) -> Reservation:
        """Give a concept a range that no other concept of this base and variant owns.

        A concept that is trained again with the same rank keeps its range; with another rank, or
        in another explicit slot, it gets a new range and gives the old one back. Ranges start at
        multiples of their rank, so that each has a slot number.

        Args:
            base: key of the base model.
            variant: "fa" or "fb".
            widths: canonical name of each adapted layer → its width in indices; noted for
                `layers`, and the narrowest one sets the capacity.
            slot: an explicit slot instead of the first free one.
            allow_overlap: register an explicit slot even if another concept owns a part of it;
                the two can then live in one library, but not in one model.

        Raises:
            CapacityError: no range of this rank is free, or the slot ends beyond the narrowest
                layer; names that layer, its width, and how many concepts of this rank it holds.
            ConfigError: variant, rank, name, slot or widths make no sense.
        """
        _check_request(variant, name, rank, slot)
        with self._transaction() as database:
            rows = _select(database, "base = ? AND variant = ?", base, variant)
            taken = [(row.start, row.stop) for row in rows if row.name != name]
            own = next((row for row in rows if row.name == name), None)
            start = _choose(own, taken, rank, widths, slot)
            stop = start + rank
            registered = allow_overlap or _is_free(start, stop, taken)
            if registered and (own is None or (own.start, own.stop) != (start, stop)):
                # Replacing the row also drops the path and digest of the older range's file.
                database.execute(
                    "INSERT OR REPLACE INTO concepts (base, variant, name, start, stop) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (base, variant, name, start, stop),
                )
            database.executemany(
                "INSERT OR REPLACE INTO layers (base, variant, layer, width) VALUES (?, ?, ?, ?)",
                [(base, variant, layer, width) for layer, width in widths.items()],
            )
        return Reservation(start, stop, start // rank, registered)

    def record(
        self, base: str, variant: str, name: str, path: str | Path, digest: str, token: str | None
    ) -> None:
        """Note the file of a concept that holds a reservation.

        Raises:
            ConfigError: the concept has no reservation.
        """
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE concepts SET path = ?, digest = ?, token = ? "
                "WHERE base = ? AND variant = ? AND name = ?",
                (os.path.abspath(path), digest, token, base, variant, name),
            )
            if not changed.rowcount:
                raise ConfigError(
                    f"concept {name!r} ({variant}) of base {base!r} has no range in {self.path}",
                    "reserve one first",
                )

    def concepts(self, base: str | None = None) -> list[Entry]:
        """All concepts, or those of one base, ordered by base, variant and start."""
        if not self.path.exists():
            return []
        with self._transaction() as database:
            return _select(database, "base = IFNULL(?, base)", base)

    def layers(self, base: str, variant: str) -> dict[str, int]:
        """Canonical name → width, of all layers that concepts of this base and variant adapted.

        Empty for concepts that an older version of this program registered.
        """
        if not self.path.exists():
            return {}
        with self._transaction() as database:
            return dict(
                database.execute(
                    "SELECT layer, width FROM layers WHERE base = ? AND variant = ? ORDER BY layer",
                    (base, variant),
                )
            )

    def remove(self, name: str, base: str | None = None, variant: str | None = None) -> Entry:
        """Forget a concept and give its range back; its file stays.

        Raises:
            ConfigError: no concept has that name, or several have and base and variant do not
                tell which is meant.
        """
        with self._transaction() as database:
            found = _select(
                database,
                "name = ? AND base = IFNULL(?, base) AND variant = IFNULL(?, variant)",
                name,
                base,
                variant,
            )
            if len(found) != 1:
                raise _not_one(name, found, self.path)
            entry = found[0]
            database.execute(
                "DELETE FROM concepts WHERE base = ? AND variant = ? AND name = ?",
                (entry.base, entry.variant, entry.name),
            )
        return entry

    @contextmanager
    def together(self) -> Iterator["Library"]:
        """This library, for changes that are made all at once, or none of them on an exception.

        Until the end other threads and processes wait to use the file.
        """
        with self._transaction() as database:
            yield _Joined(self.path, database)

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self.path)


class _Joined(Library):
    """A library whose changes belong to a transaction that is under way."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        super().__init__(path)
        self._database = database

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return nullcontext(self._database)


def default_path() -> Path:
    """$SBORA_LIBRARY, else `sbora/library.sqlite3` in the user's data folder."""
    if explicit := os.environ.get("SBORA_LIBRARY"):
        return Path(explicit)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "sbora" / "library.sqlite3"


def _select(database: sqlite3.Connection, condition: str, *values: str | None) -> list[Entry]:
    query = f"SELECT {_COLUMNS} FROM concepts WHERE {condition} ORDER BY base, variant, start"
    return [Entry(*row) for row in database.execute(query, values)]


def _choose(
    own: Entry | None,
    taken: list[tuple[int, int]],
    rank: int,
    widths: Mapping[str, int],
    slot: int | None,
) -> int:
    """The first index of the range: of the given slot, the concept's own, or the first free."""
    starts = range(0, widths[narrowest(widths)] - rank + 1, rank)
    if slot is not None:
        if slot * rank not in starts:
            raise _full(f"slot {slot} does not exist", rank, widths)
        return slot * rank
    if own is not None and own.rank == rank and own.start in starts:
        return own.start
    for start in starts:
        if _is_free(start, start + rank, taken):
            return start
    raise _full(f"no range of rank {rank} is free", rank, widths)


def _is_free(start: int, stop: int, taken: list[tuple[int, int]]) -> bool:
    return all(stop <= first or last <= start for first, last in taken)


def _check_request(variant: str, name: str, rank: int, slot: int | None) -> None:
    if variant not in ("fa", "fb"):
        raise ConfigError(f"variant must be 'fa' or 'fb', got {variant!r}", "choose one of them")
    if not name:
        raise ConfigError("a concept needs a name", "set name in concept.toml")
    if rank < 1:
        raise ConfigError(f"rank must be 1 or more, got {rank}", "choose e.g. rank 8")
    if slot is not None and slot < 0:
        raise ConfigError(f"slot must be 0 or more, got {slot}", "slots count from 0")


def _full(problem: str, rank: int, widths: Mapping[str, int]) -> CapacityError:
    layer = narrowest(widths)
    return CapacityError(
        f"{problem}: the narrowest layer, {layer!r}, is {widths[layer]} wide and holds "
        f"{widths[layer] // rank} concepts of rank {rank}",
        "lower the rank, or free a range with `sbora library remove`",
    )


def _not_one(name: str, found: list[Entry], path: Path) -> ConfigError:
    if not found:
        return ConfigError(
            f"library {path} has no concept {name!r}", "see `sbora library list` for the names"
        )
    places = ", ".join(f"{entry.base}/{entry.variant}" for entry in found)
    return ConfigError(f"{name!r} is known for {places}", "say which base and variant")
