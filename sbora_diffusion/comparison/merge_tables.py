"""Tables of what merging costs, from the records alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from sbora_diffusion.comparison.lines import Line
from sbora_diffusion.comparison.preset import Preset
from sbora_diffusion.comparison.statistics import Figure, by_category
from sbora_diffusion.comparison.tables import (
    NONE,
    TEXT,
    cell,
    figure_in,
    judges_of,
    own_lines,
    read_figure,
)
from sbora_diffusion.evaluation.paper import Merging, Paper
from sbora_diffusion.evaluation.protocols import RAW_COSINE
from sbora_diffusion.pages import table

Way = tuple[str, str]
"""An entry, and one of its ways of merging."""


def merge_tables(preset: Preset, lines: Sequence[Line], paper: Paper) -> dict[str, list[str]]:
    """Name → lines of Markdown: "merge" has a part for each number of concepts, "published" what
    others published."""
    own = own_lines(preset, lines, "merge")
    parts = []
    for size in sizes_in(own):
        parts += [f"### {size} concepts in one model", "", *_of_size(preset, own, size), ""]
    return {"merge": parts[:-1], "published": _published(paper.merging)}


def sizes_in(lines: Sequence[Line]) -> list[int]:
    """How many concepts were merged, ascending."""
    return sorted({int(size) for line in lines for size in line.get("after", {})})


def ways_in(preset: Preset, lines: Sequence[Line]) -> dict[Way, list[Line]]:
    """(entry, way of merging) → lines, in the order of the preset and of the method."""
    found: dict[Way, list[Line]] = {}
    for name, entry in preset.methods.items():
        for way in entry.how.merges:
            own = [x for x in lines if (x["method"], x["merge"]) == (name, way)]
            if own:
                found[name, way] = own
    return found


def change(size: int, name: str, line: Line) -> float | None:
    """After minus before, raw cosines; None where either is broken."""
    before = figure_in(line.get("before"), RAW_COSINE.name, name)
    after = figure_in(_after(line, size).get("figures"), RAW_COSINE.name, name)
    return None if before is None or after is None else after - before


def _after(line: Line, size: int) -> Mapping[str, Any]:
    return line.get("after", {}).get(str(size), {})


def _of_size(preset: Preset, lines: Sequence[Line], size: int) -> list[str]:
    judges = judges_of(lines)
    figures = (TEXT, *judges)
    head = ["method", "merge", *(f"{x}, {when}" for when in ("before", "change") for x in figures)]
    rows = []
    for (name, _), own in ways_in(preset, lines).items():
        before = [by_category(own, read_figure(RAW_COSINE.name, x, "before")) for x in figures]
        changes = [by_category(own, partial(change, size, x)) for x in figures]
        rows.append(
            [
                preset.methods[name].name,
                own[0]["merge_title"],
                *(_plain(figure.get("mean")) for figure in before),
                *(cell(f.get("mean"), signed=True) if f else "broken" for f in changes),
                _seconds(own, size),
            ]
        )
    return table([*head, "seconds"], rows)


def _plain(figure: Figure | None) -> str:
    return NONE if figure is None else f"{figure.value:.3f}"


def _seconds(lines: Sequence[Line], size: int) -> str:
    found = [s for line in lines if (s := _after(line, size).get("seconds")) is not None]
    return f"{median(found):.2f}" if found else NONE


def _published(rows: Sequence[Merging]) -> list[str]:
    head = ["method", "concepts", "text, change", "image, change", "time", "source"]
    return table(
        head,
        [
            [
                row.method,
                str(row.concepts),
                _signed(row.change("text")),
                _signed(row.change("image")),
                row.time or NONE,
                row.source,
            ]
            for row in rows
        ],
    )


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3f}"
