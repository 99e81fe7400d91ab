"""Tables of a preset's records, and of nothing else; the paper's figures stand beside them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sbora_diffusion.comparison.lines import Line, unique
from sbora_diffusion.comparison.preset import Preset
from sbora_diffusion.comparison.statistics import (
    CATEGORIES,
    Figure,
    Value,
    by_category,
    by_concept,
    paired,
)
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.evaluation.paper import Paper, Single
from sbora_diffusion.evaluation.protocols import RAW_COSINE
from sbora_diffusion.pages import table

NONE = "–"
TEXT = "text"
COLUMNS = (*CATEGORIES, "mean")
PAIRS = (
    ("sbora-fa", "orthogonal"),
    ("sbora-fa", "mix-of-show"),
    ("sbora-fb", "sbora-fa"),
    ("sbora", "sbora-fa"),
    ("sbora", "orthogonal"),
    ("sbora", "mix-of-show"),
    ("sbora", "lora"),
    ("sbora-fa", "sbora-fa-same"),
    ("sbora-fa", "sbora-fa-random"),
)
"""Whose differences are shown; with the paper's, where it has both."""


def own_lines(preset: Preset, lines: Sequence[Line], kind: str) -> list[Line]:
    """Lines of a preset, each once; one setting of judges and drawing for all of them.

    Args:
        kind: "merge" for lines that tell of merging, "single" for the others.

    Raises:
        FormatError: there are none, or settings differ.
    """
    own = [x for x in lines if x["preset"] == preset.name and ("merge" in x) == (kind == "merge")]
    if not own:
        raise FormatError(f"there is no line of preset {preset.name}", "run the comparison first")
    for key in ("base", "judges", "protocols", "drawing"):
        if len({repr(line["setting"][key]) for line in own}) > 1:
            raise FormatError(f"lines of preset {preset.name} differ in {key}", "move some away")
    return unique(own)


def judges_of(lines: Sequence[Line]) -> list[str]:
    """Names of the image features."""
    return list(lines[0]["setting"]["judges"])


def read_figure(protocol: str, name: str, key: str = "alone") -> Value:
    """What reads a figure of a line.

    Args:
        name: "text" or an image figure.
    """
    return partial(_of_line, protocol, name, key)


def _of_line(protocol: str, name: str, key: str, line: Line) -> float | None:
    return figure_in(line.get(key), protocol, name)


def figure_in(figures: Mapping[str, Any] | None, protocol: str, name: str) -> float | None:
    """One figure of a `Measures.figures()`; None where there is none."""
    if not figures:
        return None
    means = figures[protocol]
    found = means["text_alignment"] if name == TEXT else means["image_alignment"][name]
    return float(found)


def single_tables(preset: Preset, lines: Sequence[Line], paper: Paper) -> dict[str, list[str]]:
    """Name → lines of Markdown: "single NAME" for each of the preset's tables, "differences"."""
    own = own_lines(preset, lines, "single")
    found = {
        f"single {name}": _single(preset, entries, own, paper)
        for name, entries in preset.tables.items()
    }
    return {**found, "differences": _differences(preset, own, paper)}


def _single(
    preset: Preset, entries: Sequence[str], lines: Sequence[Line], paper: Paper
) -> list[str]:
    by_entry = {name: [x for x in lines if x["method"] == name] for name in entries}
    present = {name: own for name, own in by_entry.items() if own}
    parts = []
    for title, value, printed in _shown(preset, lines):
        head = ["method", *COLUMNS, *([f"paper: {c}" for c in COLUMNS] if printed else [])]
        rows = [
            [
                _title(preset, name, own),
                *_cells(by_category(own, value)),
                *(_paper_cells(paper, preset.methods[name].how.title, printed) if printed else []),
            ]
            for name, own in present.items()
        ]
        parts += [f"### {title}", "", *table(head, rows), ""]
    return [*parts[:-1], "", _counts(present)] if parts else []


def _shown(preset: Preset, lines: Sequence[Line]) -> list[tuple[str, Value, str]]:
    """(title, figure, the paper's table beside it) of what a table of single concepts shows."""
    judges, raw = judges_of(lines), RAW_COSINE.name
    scaled = [name for name in preset.protocols if name == "mix-of-show"]
    found = [
        (f"Text alignment, {judges[0]}, cosine", read_figure(raw, TEXT), ""),
        *(
            (f"Text alignment, {judges[0]}, {name}", read_figure(name, TEXT), "text")
            for name in scaled
        ),
    ]
    for k, judge in enumerate(judges):
        value = read_figure(raw, judge)
        found.append((f"Image alignment, {judge}, all pairs", value, "" if k else "image"))
    first = f"{judges[0]}, first-reference"
    found += [
        (f"Image alignment, {judges[0]}, first reference, {name}", read_figure(name, first), "")
        for name in scaled
    ]
    return found


def _title(preset: Preset, name: str, lines: Sequence[Line]) -> str:
    known = {line.get("tuned") for line in lines if "tuned" in line}
    untuned = preset.methods[name].grid or preset.methods[name].tuned_as
    mark = " (not tuned)" if untuned and known == {False} else ""
    return f"{preset.methods[name].name}{mark}"


def _cells(figures: Mapping[str, Figure], signed: bool = False) -> list[str]:
    return [cell(figures.get(column), signed) for column in COLUMNS]


def cell(figure: Figure | None, signed: bool = False) -> str:
    """ "0.712 [0.690, 0.731]", with the number of broken lines where there are any."""
    if figure is None:
        return NONE
    form = "+.3f" if signed else ".3f"
    text = f"{figure.value:{form}}"
    if figure.interval:
        low, high = figure.interval
        text += f" [{low:{form}}, {high:{form}}]"
    return f"{text}, {figure.broken} broken" if figure.broken else text


def _paper_cells(paper: Paper, title: str, printed: str) -> list[str]:
    found = _in_paper(paper, title)
    if found is None:
        return [NONE] * len(COLUMNS)
    cells = getattr(found, printed)
    return [
        f"{getattr(cells, column):.4f}{'?' if f'{printed}.{column}' in found.suspect else ''}"
        for column in COLUMNS
    ]


def _in_paper(paper: Paper, title: str) -> Single | None:
    return next((row for row in paper.single if row.method == title), None)


def _counts(lines: Mapping[str, Sequence[Line]]) -> str:
    """Concepts, seeds and trained numbers, for below a table."""
    rows = [line for own in lines.values() for line in own]
    concepts = len({line["concept"] for line in rows})
    seeds = max(len({line["seed"] for line in own}) for own in lines.values())
    drawing = rows[0]["setting"]["drawing"]
    numbers = {
        own[0]["title"]: max(x["trainable"]["weights"] for x in own if "trainable" in x)
        for own in lines.values()
        if any("trainable" in line for line in own)
    }
    trained = ", ".join(f"{title} {count:,}" for title, count in numbers.items())
    return (
        f"{concepts} concepts, {seeds} seeds, twenty prompts × {drawing['num']} pictures. "
        f"Trained weights of a concept: {trained}."
    )


def _differences(preset: Preset, lines: Sequence[Line], paper: Paper) -> list[str]:
    """Paired differences of two methods, concept by concept."""
    judges = judges_of(lines)
    protocol = "mix-of-show" if "mix-of-show" in preset.protocols else RAW_COSINE.name
    values = {TEXT: read_figure(protocol, TEXT)}
    values |= {judge: read_figure(RAW_COSINE.name, judge) for judge in judges}
    head = ["", f"text, {protocol}", *judges, "paper: text", "paper: image"]
    rows = []
    for one, other in PAIRS:
        ours, theirs = ([x for x in lines if x["method"] == name] for name in (one, other))
        if ours and theirs:
            pairs = [paired(by_concept(ours, v), by_concept(theirs, v)) for v in values.values()]
            titles = [preset.methods[name].how.title for name in (one, other)]
            cells = [cell(figure, signed=True) for figure in pairs]
            rows.append([" − ".join(titles), *cells, *_paper_difference(paper, *titles)])
    return table(head, rows) if rows else []


def _paper_difference(paper: Paper, one: str, other: str) -> list[str]:
    ours, theirs = _in_paper(paper, one), _in_paper(paper, other)
    if ours is None or theirs is None:
        return [NONE, NONE]
    parts = ((getattr(ours, t).mean, getattr(theirs, t).mean) for t in ("text", "image"))
    return [f"{a - b:+.4f}" for a, b in parts]
