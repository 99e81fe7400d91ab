"""The full forms, and a table of what they counted: `python -m tests.reliability`.

`--record` keeps the figures in `results/reliability.json`; where this is no checkout, `--commit`
says of which. Further arguments are pytest's, `-k` for a part of them. A test counts by
`record_property("<number> <what>", <figure>)`; figures of one name add up.
"""

import argparse
import sys
import time
from collections import Counter
from typing import Any

import pytest

from sbora_diffusion.records import commit_here
from tests.reliability.record import RECORD, keep

CORE, DIFFUSION = "tests/core/test_", "tests/diffusion/test_"
ELSEWHERE = {  # properties that are tested in full in the ordinary suite
    5: [f"{CORE}folded_set.py::test_forty_orders_of_eight_concepts_give_the_same_bytes"],
    6: [
        f"{CORE}folded_set.py::"
        "test_any_subset_removed_equals_merging_the_others_and_all_removed_the_base"
    ],
    7: [
        f"{CORE}folded_set.py::test_untouched_entries_keep_their_bits_and_touched_ones_change",
        f"{DIFFUSION}merging.py::"
        "test_outside_the_owned_rows_and_columns_every_parameter_is_the_bases",
    ],
    8: [
        f"{CORE}folded_training.py::test_the_forward_pass_is_that_of_the_merged_layer_bit_for_bit",
        f"{DIFFUSION}folded_training.py::"
        "test_pictures_between_the_steps_are_those_of_the_merged_model",
    ],
    11: [f"{CORE}fingerprint.py", f"{DIFFUSION}bases.py"],
    12: [f"{CORE}concept_reading.py"],
    14: [f"{CORE}allocation.py::test_processes_agree_whatever_hash_seed_and_order_of_layers"],
    17: [f"{DIFFUSION}dataset.py"],
    21: [
        f"{CORE}folded_set.py::test_random_operations_equal_a_fresh_build_each_time",
        f"{DIFFUSION}folding_promises.py::"
        "test_a_thousand_operations_on_the_pocket_equal_a_fresh_build_each_time",
        f"{DIFFUSION}folding_promises.py::"
        "test_random_operations_in_the_shapes_of_sd15_equal_a_fresh_build_each_time",
    ],
}


class Figures:
    """A plugin of pytest that gathers what tests counted, and how they ended."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome
        if report.when == "call":
            for name, value in report.user_properties:
                self.counted[name] += value

    def lines(self) -> list[str]:
        """Number of the property, figure, what was counted; in the order of the numbers."""
        found: list[tuple[int, str, Any]] = []
        for name, value in self.counted.items():
            number, what = name.split(" ", 1)
            found.append((int(number), what, value))
        for number, tests in ELSEWHERE.items():
            for test in tests:
                own = [outcome for name, outcome in self.ended.items() if name.startswith(test)]
                found.append((number, test, f"{own.count('passed')} of {len(own)}"))
        found.sort(key=_place)
        return [f"{number:>4}  {value!s:>10}  {what}" for number, what, value in found]


def _place(line: tuple[int, str, Any]) -> tuple[int, str]:
    return line[:2]


def main() -> int:
    """Run everything; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--commit", default=None)
    known, options = parser.parse_known_args()
    commit = (known.commit or commit_here()) if known.record else ""
    figures, began = Figures(), time.monotonic()
    tests = ["tests/reliability", *(test for tests in ELSEWHERE.values() for test in tests)]
    status = pytest.main(["-m", "not slow", *tests, *options], plugins=[figures])
    lines = figures.lines()
    print("\ntest      figure  what")
    print("\n".join(lines))
    if known.record:
        command = " ".join(["python -m tests.reliability", *sys.argv[1:]])
        found = {**Counter(figures.ended.values()), "lines": lines}
        name = " ".join(["full forms", *options])
        keep(RECORD, name, command, time.monotonic() - began, commit, found)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
