"""What checks, merges and evaluations found, as HTML."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbora_diffusion.app.job_store import Job
from sbora_diffusion.app.known_concepts import table
from sbora_diffusion.app.merging import Verdict
from sbora_diffusion.app.shown import shown_command, shown_path

RECORDS = Path(__file__).parents[2] / "results"
"""In a checkout; the installed package has none."""
CONDITIONS = {
    "class_word": "the bare class word", "single": "each concept alone",
    "routed": "the library, routed by prompt", "merged3_mixed": "three in one model",
    "merged_all": "all fourteen in one model",
}  # fmt: skip


def verdict(found: Verdict) -> str:
    """In words, with the overlaps of every two."""
    parts = [f'<p class="problem">{html.escape(text)}</p>' for text in found.problems]
    parts += [f'<p class="note">{html.escape(text)}</p>' for text in (*found.notes, *found.prices)]
    if not found.problems:
        one = len(found.names) == 1
        fine = "It can be merged." if one else "They can live in one model."
        parts.insert(0, f'<p class="good">{fine}</p>')
    if len(found.names) > 1:
        parts.append("<p>Shared columns or rows, over all layers:</p>" + _overlaps(found))
    return "".join(parts)


def same(words: Sequence[str]) -> str:
    """A command that does the same, for what is done at once and is no job."""
    command = html.escape(shown_command(["sbora", *words]))
    return f'<p class="note">The same on the command line: <code class="path">{command}</code></p>'


def result(job: Job) -> str:
    """What an ended job says, by its kind."""
    document = job.result()
    if not document:
        return ""
    show = {"check": _check, "evaluate": _evaluation, "merge": _made, "export": _made}
    return show.get(job.kind, lambda _: "")(document)


def study() -> str:
    """Alignment of fourteen concepts alone and merged, from the record; "" without one."""
    try:
        record = json.loads((RECORDS / "merging_quality.json").read_text(encoding="utf-8"))
        means = {name: record["means"][name] for name in CONDITIONS}
    except (OSError, ValueError, KeyError):
        return ""
    figures = list(means["single"])
    rows = [
        [CONDITIONS[name], *(f"{mean[figure]['value']:.3f}" for figure in figures)]
        for name, mean in means.items()
    ]
    heads = [figure.replace("_", " ").replace("text alignment", "text") for figure in figures]
    return table(("", *heads), rows)


def _overlaps(found: Verdict) -> str:
    def cell(first: str, second: str) -> str:
        return "·" if first == second else str(found.shared.get(frozenset((first, second)), 0))

    return table(("", *found.names), [[a, *(cell(a, b) for b in found.names)] for a in found.names])


def _check(document: Mapping[str, Any]) -> str:
    crosstalk = document.get("crosstalk")
    if not crosstalk:
        return "<p>One concept has nobody to disturb.</p>"
    names = crosstalk["concepts"]
    rows = [
        [name, *("·" if p == q else _number(v) for q, v in enumerate(row))]
        for p, (name, row) in enumerate(zip(names, crosstalk["rms"], strict=True))
    ]
    parts = ["<p>Crosstalk: row, whose prompts; column, who disturbs; 1 is as loud as itself.</p>"]
    parts.append(table(("", *names), rows))
    predicted = [
        [way.replace("_", " "), one["concept"], _number(one["disturbance"])]
        for way, found in (document.get("prediction") or {}).items()
        for one in found["concepts"]
    ]
    parts.append("<p>What a merge will change for each, predicted:</p>")
    parts.append(table(("merged", "concept", "change"), predicted))
    return "".join(parts)


def _evaluation(document: Mapping[str, Any]) -> str:
    groups = [document.get(name) for name in ("class_word", "concept", "difference")]
    if not all(groups):
        return ""
    rows = [["text alignment", *(_number(g["text_alignment"], 3) for g in groups if g)]]
    rows += [
        [f"image alignment, {name}", *(_number(g["image_alignment"][name], 3) for g in groups if g)]
        for name in groups[0]["image_alignment"]  # type: ignore[index]
    ]
    return table(("", "class word", "concept", "difference"), rows)


def _made(document: Mapping[str, Any]) -> str:
    place = document.get("folder") or document.get("file") or ""
    return f'<p>It is in <code class="path">{html.escape(shown_path(place))}</code></p>'


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
