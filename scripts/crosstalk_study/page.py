"""The tables of docs/crosstalk.md, from the record."""

from collections.abc import Mapping, Sequence
from typing import Any

from study_options import FIGURES

WINNER = "preserved, batch 8"
NONE = "–"
DRIFT = FIGURES[-1]
"""The features in which the distance of pictures without a concept is shown."""

Record = Mapping[str, Any]


def tables(record: Record) -> dict[str, list[str]]:
    """Name → lines of Markdown."""
    rows = record["recipes"]
    winner = next(row for row in rows if row["recipe"] == WINNER)
    return {
        "recipes": _table(
            ("recipe", "alone", "added", "averaged", "calibrated", "its worst concepts"),
            [_recipe(row) for row in rows],
        ),
        "merges": _table(
            (
                "merge", "change", "strong concepts", "their worst",
                "strong concepts, against the best plain recipe alone", "their worst", "distance",
            ),
            [(way, *_merge(found)) for way, found in winner["merged"].items()],
        ),
        "unrelated": _table(
            ("recipe", *UNRELATED),
            [(row["recipe"], *(_distance(row, way) for way in UNRELATED)) for row in rows],
        ),
    }  # fmt: skip


UNRELATED = (
    "added", "averaged", "calibrated", "calibrated, generic 30", "calibrated, generic 300",
)  # fmt: skip


def _recipe(row: Record) -> Sequence[str]:
    ways = [row["merged"].get(way) for way in ("added", "averaged", "calibrated")]
    worst = ways[-1]["worst"].values() if ways[-1] else None
    return (
        row["recipe"],
        _figures((f["value"] for f in row["alone"].values()), ".3f"),
        *(_change(way and way["change"]) for way in ways),
        _figures(worst, "+.3f") if worst else NONE,
    )


def _merge(found: Record) -> Sequence[str]:
    return (
        _change(found["change"]),
        _change(found["change_of_strong"]),
        _figures(found["worst_of_strong"].values(), "+.3f"),
        _change(found["change_against_best_plain_of_strong"]),
        _figures(found["worst_against_best_plain_of_strong"].values(), "+.3f"),
        f"{found['unrelated_distance'][DRIFT]:.3f}",
    )


def _change(figures: Record | None) -> str:
    return _figures((f["value"] for f in figures.values()), "+.3f") if figures else NONE


def _distance(row: Record, way: str) -> str:
    found = row["merged"].get(way)
    return f"{found['unrelated_distance'][DRIFT]:.3f}" if found else NONE


def _figures(values: Any, form: str) -> str:
    return " / ".join(f"{value:{form}}" for value in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
