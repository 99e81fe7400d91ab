"""Many processes change one library at once, and some are killed in the middle of it."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sbora_diffusion.core.errors import CapacityError
from sbora_diffusion.library import Entry, Library
from tests.library_writer import BASE, VARIANT

ROOT = Path(__file__).parent.parent
PROCESSES, CHANGES, KILLS = 8, 30, 4
NEVER = -1


@dataclass
class Writer:
    """A running `library_writer.py` and what it has reported, in order."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    def read(self) -> list[str]:
        assert self.process.stdout
        self.lines += self.process.stdout.read().splitlines()
        self.process.wait(60)
        return self.lines

    def kill_after(self, lines: int) -> None:
        assert self.process.stdout
        self.lines += [self.process.stdout.readline().rstrip() for _ in range(lines)]
        self.process.kill()


@dataclass
class Told:
    """What the reports of one writer say about the library.

    Attributes:
        owned: name → range, of every reservation that was confirmed and not removed.
        recorded: names whose file was confirmed to be noted.
        pending: what the writer was doing when it died, e.g. "removing w1_3".
    """

    owned: dict[str, tuple[int, int]] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    pending: str = ""


def told(lines: list[str]) -> Told:
    known = Told()
    for line in lines:
        verb, name, *numbers = f"{line} ".split(" ")
        known.pending = line if verb.endswith("ing") else ""
        if verb == "reserved":
            known.owned[name] = (int(numbers[0]), int(numbers[1]))
        elif verb == "removed":
            known.owned.pop(name)
            known.recorded.discard(name)
        elif verb == "recorded":
            known.recorded.add(name)
    return known


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library.sqlite3")


@pytest.fixture
def start(library) -> Iterator:
    running: list[Writer] = []

    def launch(worker: int, count: int, width: int = 10_000, die_after: int = NEVER) -> Writer:
        program = [sys.executable, ROOT / "tests" / "library_writer.py", library.path]
        arguments = map(str, (width, worker, count, die_after))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        writer = Writer(
            subprocess.Popen(
                [*map(str, program), *arguments], stdout=subprocess.PIPE, text=True, env=environment
            )
        )
        running.append(writer)
        return writer

    yield launch
    for writer in running:
        writer.process.kill()
        writer.process.communicate()


def assert_disjoint(entries: list[Entry]) -> None:
    owned = [index for entry in entries for index in range(entry.start, entry.stop)]
    assert len(owned) == len(set(owned))


def assert_as_told(entries: list[Entry], reports: list[Told]) -> None:
    """The library holds what was confirmed; only what was under way may be either way."""
    found = {entry.name: entry for entry in entries}
    unsettled = {report.pending.split(" ")[1] for report in reports if report.pending}
    expected = {name: range_ for report in reports for name, range_ in report.owned.items()}
    for name, range_ in expected.items():
        assert name in found or name in unsettled, f"{name} is lost"
        assert name not in found or (found[name].start, found[name].stop) == range_
    assert found.keys() - expected.keys() <= unsettled
    recorded = {name for report in reports for name in report.recorded} & found.keys()
    assert all(found[name].digest == "d" * 64 for name in recorded)


def test_processes_that_are_killed_at_random_lose_nothing_and_overlap_nowhere(library, start):
    random_ = random.Random(0)
    writers = [start(worker, CHANGES) for worker in range(PROCESSES)]
    for victim in random_.sample(writers, KILLS):
        victim.kill_after(random_.randrange(1, CHANGES))
    reports = [told(writer.read()) for writer in writers]
    finished = [writer for writer in writers if writer.lines[-1:] == ["done"]]
    assert PROCESSES - KILLS <= len(finished) < PROCESSES
    entries = library.concepts()
    assert_disjoint(entries)
    assert_as_told(entries, reports)
    assert sum(len(report.owned) for report in reports) > PROCESSES

    for entry in entries:
        library.remove(entry.name)
    widths = {"unet.narrow": 36, "unet.wide": 100}
    got = [library.reserve(BASE, VARIANT, f"again{k}", 8, widths) for k in range(4)]
    assert [reservation.start for reservation in got] == [0, 8, 16, 24], "freed ranges are used"
    with pytest.raises(CapacityError) as caught:
        library.reserve(BASE, VARIANT, "too_many", 8, widths)
    for part in ("'unet.narrow'", "36 wide", "4 concepts of rank 8"):
        assert part in str(caught.value)


@pytest.mark.parametrize("worker", range(5))
def test_a_process_that_dies_before_its_commit_leaves_the_library_as_it_was(library, start, worker):
    """SIGKILL strikes after the writes of a transaction, at another change for each worker."""
    report = told(start(worker, 40, die_after=3 + 4 * worker).read())
    assert report.pending, "it died in the middle of a change"
    entries = library.concepts()
    assert {entry.name: (entry.start, entry.stop) for entry in entries} == report.owned
    assert library.reserve(BASE, VARIANT, "after", 8, {"unet.narrow": 10_000}).registered


def test_a_journal_left_behind_by_a_killed_process_is_rolled_back(library, start):
    """Pages written to the file before the commit are undone by the next process to open it."""
    start(0, 5).read()
    before = library.concepts()
    spilling = (
        "import os, signal, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1')\n"  # so that dirty pages reach the file early
        "db.execute('BEGIN IMMEDIATE')\n"
        "db.execute('DELETE FROM concepts')\n"
        "for k in range(3000):\n"
        "    row = ('b' * 90, 'fa', f'n{k}', k, k + 1)\n"
        "    db.execute('INSERT INTO concepts VALUES (?, ?, ?, ?, ?, 0, 0, 0)', row)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    size = library.path.stat().st_size
    subprocess.run([sys.executable, "-c", spilling, str(library.path)], check=False)
    assert library.path.stat().st_size > size, "the killed process had written to the file"
    assert library.path.with_name(f"{library.path.name}-journal").exists()
    assert library.concepts() == before
