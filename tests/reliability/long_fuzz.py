"""A long run of the fuzzer in several processes, recorded as it goes:
`python -m tests.reliability.long_fuzz --count 1000000 --processes 2`.

The same command at the same commit goes on where an earlier one was stopped.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sbora_diffusion.records import commit_here
from tests.reliability.fuzz import Figures, fuzz
from tests.reliability.record import RECORD, keep, kept

CHUNK = 20_000


def together(one: Figures, other: Figures) -> Figures:
    """The figures of two runs: sums, and the larger of what was measured."""

    def joined(a: Any, b: Any) -> Any:
        return max(a, b) if isinstance(a, float) else a + b

    return Figures(**{name: joined(a, vars(other)[name]) for name, a in vars(one).items()})


def chunks(count: int, seed: int, done: int, processes: int, folder: Path) -> Iterator[Figures]:
    """The figures of each chunk in their order, from file number `done` on."""
    firsts = range(done, count, CHUNK)
    sizes = [min(CHUNK, count - first) for first in firsts]
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = len(firsts)
        yield from pool.map(fuzz, sizes, [seed] * rows, firsts, [folder] * rows)


def begun(path: Path, name: str, commit: str) -> tuple[Figures, float]:
    """What an earlier run at this commit counted, and in how many seconds."""
    run = kept(path, name)
    if not run or run["commit"] != commit:
        return Figures(), 0.0
    found = {key: run["figures"][key] for key in vars(Figures())}
    counters = {key: Counter(found[key]) for key in ("errors", "kinds")}
    return Figures(**{**found, **counters}), run["seconds"]


def main() -> int:
    """Status 1 if there are failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--keep", type=Path, help="folder for files that fail", default=None)
    parser.add_argument("--commit", help="where this is no checkout", default=None)
    options = parser.parse_args()
    name, commit = f"fuzz, seed {options.seed}", options.commit or commit_here()
    asked = f"--count {options.count} --seed {options.seed} --processes {options.processes}"
    figures, before = begun(options.record, name, commit)
    began, done = time.monotonic(), figures.files - figures.corpus
    for part in chunks(options.count, options.seed, done, options.processes, options.keep):
        figures = together(figures, part)
        seconds = before + time.monotonic() - began
        done = figures.files - figures.corpus
        found = {"asked": options.count, "done": done, **vars(figures)}
        line = f"python -m tests.reliability.long_fuzz {asked}"
        keep(options.record, name, line, seconds, commit, found)
        print(f"{done} of {options.count}, {len(figures.failures)} failures", flush=True)
    return 1 if figures.failures else 0


if __name__ == "__main__":
    sys.exit(main())
