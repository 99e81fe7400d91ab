"""The page of a preset: its tables and plots, from the records alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sbora_diffusion.bench.picture import png_bytes
from sbora_diffusion.comparison.lines import Line, read_lines
from sbora_diffusion.comparison.merge_tables import merge_tables
from sbora_diffusion.comparison.plot import merge_picture, single_picture
from sbora_diffusion.comparison.preset import Preset
from sbora_diffusion.comparison.tables import own_lines, single_tables
from sbora_diffusion.core.storage import write_atomically
from sbora_diffusion.evaluation.paper import Paper, load_paper
from sbora_diffusion.outputs import make_parent
from sbora_diffusion.pages import table, with_tables

Tables = Mapping[str, Sequence[str]]
KINDS: dict[
    str,
    tuple[
        Callable[[Preset, Sequence[Line], Paper], Tables],
        Callable[[Preset, Sequence[Line]], Image.Image],
    ],
] = {"single": (single_tables, single_picture), "merge": (merge_tables, merge_picture)}
"""Command → what makes its tables and its picture."""


def render(preset: Preset, kind: str, folder: Path, page: Path) -> list[Path]:
    """Write a page's tables and the picture beside it again.

    Args:
        kind: "single" or "merge".
        folder: of the record.

    Returns:
        What was written.

    Raises:
        FormatError: there is no such record, its lines do not fit together, or the page has no
            place for a table.
    """
    tables_of, picture_of = KINDS[kind]
    lines = read_lines(folder)
    found = tables_of(preset, lines, load_paper())
    drawn = page.with_name(f"{page.stem}_{kind}.png")
    _write(page, preset, {**found, **_runs(kind, preset, lines)})
    write_atomically(drawn, png_bytes(picture_of(preset, lines)))
    return [page, drawn]


def render_tuning(preset: Preset, record: Mapping[str, Any], page: Path) -> Path:
    """Write the table of what tuning found."""
    _write(page, preset, {"tuning": tuning_table(preset, record)})
    return page


def tuning_table(preset: Preset, record: Mapping[str, Any]) -> list[str]:
    """Each method's winner among its trials."""
    rows = []
    for name, found in record["methods"].items():
        best = next(t for t in found["trials"] if t["changes"] == found["settings"])
        settings = ", ".join(f"{key} {value:g}" for key, value in found["settings"].items())
        images = [f"{value:.3f}" for value in best["image_alignment"].values()]
        text = f"{best['text_alignment']:.3f}"
        trials = str(len(found["trials"]))
        rows.append([preset.methods[name].name, trials, settings, text, *images])
    judges = record["setting"]["judges"]
    return table(["method", "trials", "best settings", "text", *judges], rows)


def _runs(kind: str, preset: Preset, lines: Sequence[Line]) -> dict[str, list[str]]:
    """Where the figures come from."""
    runs = [line["run"] for line in own_lines(preset, lines, kind)]
    keys = ("device", "commit", "date")
    parts = {key: list(dict.fromkeys(run[key] for run in runs)) for key in keys}
    stated = "; ".join(f"{key} {', '.join(found)}" for key, found in parts.items())
    hours = sum(run["seconds"] for run in runs) / 3600
    return {f"{kind} runs": [f"{len(runs)} lines, {stated}; {hours:.1f} h of drawing and judging."]}


def _write(page: Path, preset: Preset, tables: Tables) -> None:
    text = page.read_text(encoding="utf-8") if page.exists() else blank(preset)
    make_parent(page)
    write_atomically(page, with_tables(text, tables).encode())


def blank(preset: Preset) -> str:
    """A page with a place for each table."""
    names = [
        "tuning", *(f"single {name}" for name in preset.tables), "differences", "single runs",
        "merge", "published", "merge runs",
    ]  # fmt: skip
    places = "\n".join(f"## {n}\n<!-- table: {n} -->\n<!-- end: {n} -->\n" for n in names)
    return f"# Methods, preset {preset.name}\n\n{places}"
