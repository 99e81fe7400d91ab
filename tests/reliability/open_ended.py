"""Spoilt files without end, chosen and made small by hypothesis, until one fails or time is up:
`python -m tests.reliability.open_ended --minutes 60`. What fails goes into the corpus.
"""

import argparse
import random
import sys
import time
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.reliability.fuzz import (
    CORPUS,
    Figures,
    Reader,
    keep_inputs,
    seed_files,
    temporary_folder,
)
from tests.reliability.mutations import Mutant, mutant

ROUND = 1000


class Failed(Exception):
    """A file was not refused, or not read as what it says."""

    def __init__(self, spoilt: Mutant, reason: str) -> None:
        super().__init__(f"{spoilt.kind}: {reason}")
        self.spoilt = spoilt


def search(minutes: float, first: int, figures: Figures) -> None:
    """Rounds of examples, each from a seed of its own.

    Raises:
        Failed: with the smallest file that was found to fail.
    """
    with temporary_folder() as folder:
        seeds = seed_files(folder)
        reader = Reader(folder, seeds, figures)
        reader.warm_up(seeds)

        def holds(rng: random.Random) -> None:
            spoilt = mutant(rng, seeds)
            reader.judge(spoilt)
            if figures.failures:
                raise Failed(spoilt, figures.failures.pop()[1])

        usual = settings(
            max_examples=ROUND, deadline=None, database=None, suppress_health_check=HealthCheck
        )
        examples = usual(given(st.randoms(use_true_random=False))(holds))
        ends = time.monotonic() + 60 * minutes
        for number in count(first):
            if time.monotonic() >= ends:
                return
            seed(number)(examples)()
            print(f"seed {number}: {figures.files} files, {figures.refused} refused", flush=True)


def main() -> int:
    """Status 1 if a file failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for a file that fails", default=CORPUS)
    options = parser.parse_args()
    try:
        search(options.minutes, options.seed, Figures())
    except Failed as failed:
        keep_inputs([failed.spoilt], options.keep)
        print(failed)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
