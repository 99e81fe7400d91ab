"""The SQLite file of a library: its tables, and write transactions that nothing can interrupt.

SQLite's rollback journal makes each transaction whole: a process that is killed in the middle
leaves the file as it was before it, and the next process to open it undoes what was half written.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sbora_diffusion.core.errors import FormatError, ResourceError

APPLICATION_ID = 0x53426F52  # "SBoR", marks the SQLite file as a library
BUSY_SECONDS = 30.0

_CONCEPTS = """
CREATE TABLE concepts (
    base TEXT NOT NULL,
    variant TEXT NOT NULL CHECK (variant IN ('fa', 'fb')),
    name TEXT NOT NULL,
    start INTEGER NOT NULL CHECK (start >= 0),
    stop INTEGER NOT NULL CHECK (stop > start),
    path TEXT,
    digest TEXT,
    token TEXT,
    PRIMARY KEY (base, variant, name)
)
"""
# Older libraries lack this table; they get it when they are opened.
_LAYERS = """
CREATE TABLE IF NOT EXISTS layers (
    base TEXT NOT NULL,
    variant TEXT NOT NULL,
    layer TEXT NOT NULL,
    width INTEGER NOT NULL CHECK (width > 0),
    PRIMARY KEY (base, variant, layer)
)
"""


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """One write transaction on a connection of its own, safe across threads and processes.

    Raises:
        FormatError: the file is not a library.
        ResourceError: it cannot be opened, written or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(_connect(path)) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                _prepare(database, path)
                yield database
            except BaseException:
                if database.in_transaction:  # SQLite itself rolls back when the disk is full
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"library {path} cannot be used: {reason}",
            "give a writable file with --library or SBORA_LIBRARY",
        ) from error
    except sqlite3.DatabaseError as error:
        raise _not_a_library(path) from error


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    """Create the tables in a new file; refuse a database that belongs to another program."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise _not_a_library(path)
        database.execute(_CONCEPTS)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(_LAYERS)


def _not_a_library(path: Path) -> FormatError:
    return FormatError(
        f"{path} is not a concept library", "give another file with --library or SBORA_LIBRARY"
    )
