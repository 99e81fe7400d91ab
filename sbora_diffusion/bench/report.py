"""Tables from a record of `sbora bench speed`, and from nothing else."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbora_diffusion.bench.settings import WHAT
from sbora_diffusion.core.errors import FormatError

MIB = 1 << 20


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        rows: as many cells each as there are columns.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def read_record(path: Path) -> dict[str, Any]:
    """A record of this benchmark.

    Raises:
        FormatError: the file is something else, or cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise FormatError(
            f"{path} is not JSON: {error}", "give what `sbora bench speed` wrote"
        ) from error
    if not isinstance(record, dict) or record.get("what") != WHAT:
        raise FormatError(f"{path} is not a record of `sbora bench speed`", "give its --out")
    return record


def tables(record: Mapping[str, Any]) -> list[Table]:
    """All figures of a record; goals come last."""
    titles = record["titles"]
    found = [_layer_table(record["layer"], titles)] if "layer" in record else []
    for shape in record.get("step", {}).values():
        found += [_batch_table(shape, size, figures, titles) for size, figures in _batches(shape)]
        found.append(_size_table(shape, titles))
    found += [_mixed_table(shape, titles) for shape in record.get("mixed_batch", {}).values()]
    found += [_merge_table(shape) for shape in record.get("merging", {}).values()]
    if "training" in record:
        found.append(_training_table(record["training"]))
    goals = [[place, what, *_verdict(goal)] for place, what, goal in goals_of(record)]
    if goals:
        found.append(Table("Goals", ["of", "what", "figure", "goal", "met"], goals))
    missing = [[name, reason] for name, reason in _missing(record)]
    if missing:
        found.append(Table("Without a figure", ["what", "why"], missing))
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """A page with all tables."""
    commit, date, versions = record["commit"], record["date"], record["versions"]
    lines = [
        "# Speed",
        f"Measured on {record['device']} ({date}, commit {commit}, torch {versions['torch']}): "
        f"`{record['command']}`. Times are medians over interleaved rounds, ratios are taken "
        f"within a round, quartiles stand in brackets. Memory is {record['memory']}.",
        *([] if record["finished"] else ["", "The run did not come to its end."]),
    ]
    for table in tables(record):
        lines += [
            "",
            f"## {table.title}",
            _line(table.columns),
            _line(["---"] * len(table.columns)),
        ]
        lines += [_line(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def goals_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(shape and batch, what is measured, figure with its bound)."""
    if "layer" in record:
        yield from _named(record["layer"]["title"], record["layer"]["goals"])
    for shape in record.get("step", {}).values():
        for size, figures in _batches(shape):
            yield from _named(f"{shape['title']}, batch {size}", figures["goals"])
        yield from _named(shape["title"], shape["goals"])
    for shape in record.get("mixed_batch", {}).values():
        yield from _named(_mixed_title(shape), shape["goals"])
    if "training" in record:
        yield from _named(record["training"]["title"], record["training"]["goals"])
    for shape in record.get("merging", {}).values():
        for variant in ("fa", "fb"):
            bounded = {what: f for what, f in shape[variant].items() if "met" in f}
            place = f"{shape['title']}, {shape['concepts']} concepts"
            yield from _named(place, {f"{variant}: {w}, ms": f for w, f in bounded.items()})


def _named(place: str, goals: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for what, goal in goals.items():
        yield place, what, goal


def _batches(shape: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(shape["batches"].items(), key=lambda pair: int(pair[0]))


def _layer_table(layer: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    rows = [[_title(name, titles), *_times(figures)] for name, figures in layer["methods"].items()]
    columns = ["forward and backward pass", "ms", "over frozen"]
    return Table(f"{layer['title']}, rank {layer['rank']}, {layer['dtype']}", columns, rows)


def _batch_table(
    shape: Mapping[str, Any], size: str, figures: Mapping[str, Any], titles: Mapping[str, str]
) -> Table:
    rows = [
        [titles[name], mode, *_times(measured), *_memory(measured)]
        for name, mode, measured in _by_mode(figures["methods"])
    ]
    columns = ["training step", "mode", "ms", "over frozen", "memory MiB", "over frozen"]
    about = f"rank {shape['rank']}, {shape['dtype']}, {shape['layers']} layers"
    return Table(f"{shape['title']}, batch {size}, {about}", columns, rows)


def _by_mode(methods: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, modes in methods.items():
        yield from ((name, mode, found) for mode, found in modes.items() if mode != "at_best")


def _mixed_table(shape: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    rows = [
        [titles[name], mode, *_times(measured)]
        for name, mode, measured in _by_mode(shape["methods"])
    ]
    title = f"{_mixed_title(shape)}, rank {shape['rank']}, {shape['dtype']}"
    if shape.get("folded_before"):  # records from before have no such figure
        title += (
            f", {shape['folded_before']} of {shape['layers']} layers' weights folded once before"
        )
    return Table(title, ["forward pass", "mode", "ms", "over frozen"], rows)


def _mixed_title(shape: Mapping[str, Any]) -> str:
    return f"{shape['title']}, {shape['rows']} concepts in one batch"


def _training_table(training: Mapping[str, Any]) -> Table:
    rows = [
        ["concepts", str(training["concepts"])],
        ["steps", str(training["steps"])],
        ["seconds to load the pictures", f"{training['seconds']['loading']:.1f}"],
        ["seconds in all", f"{training['seconds']['all']:.1f}"],
    ]
    return Table(f"{training['title']}, rank {training['rank']}", ["training", ""], rows)


def _size_table(shape: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    rows = [
        [titles[name], f"{own['parameters']:,}", _kib(own["optimizer_bytes"]),
         _kib(own["file_bytes"])]
        for name, own in shape["adapters"].items()
    ]  # fmt: skip
    columns = ["stored", "parameters", "optimizer KiB", "file KiB"]
    return Table(f"{shape['title']}, rank {shape['rank']}", columns, rows)


def _merge_table(shape: Mapping[str, Any]) -> Table:
    rows = [
        [what.replace("_", " "), *(_milliseconds(shape[variant][what]) for variant in ("fa", "fb"))]
        for what in shape["fa"]
    ]
    title = f"{shape['title']}, {shape['concepts']} concepts of rank {shape['rank']}"
    return Table(title, ["merging", "FA, ms", "FB, ms"], rows)


def _missing(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from record["absent"].items()
    yield from record["failed"].items()
    yield from record.get("layer", {}).get("failed", {}).items()
    for shape in record.get("step", {}).values():
        yield from ((f"{shape['title']}: {k}", why) for k, why in shape["failed"].items())
        for size, figures in _batches(shape):
            place = f"{shape['title']}, batch {size}"
            yield from ((f"{place}: {k}", why) for k, why in figures["failed"].items())
    for shape in record.get("mixed_batch", {}).values():
        yield from ((f"{_mixed_title(shape)}: {k}", why) for k, why in shape["failed"].items())


def _title(name: str, titles: Mapping[str, str]) -> str:
    method, _, after = name.partition("_write_back")
    return f"{titles[name]}" if name in titles else f"{titles[method]}: write-back{after}"


def _times(figures: Mapping[str, Any]) -> list[str]:
    low, high = figures["over_floor_quartiles"]
    ratio = f"{figures['over_floor']:.3f} [{low:.3f}, {high:.3f}]"
    return [f"{1000 * figures['median']:.2f}", ratio]


def _memory(figures: Mapping[str, Any]) -> list[str]:
    if "peak_bytes" not in figures:
        return ["", ""]
    return [f"{figures['peak_bytes'] / MIB:,.1f}", f"{figures['peak_over_floor']:.3f}"]


def _milliseconds(figure: Mapping[str, Any]) -> str:
    low, high = figure["quartiles"]
    return f"{figure['value']:.2f} [{low:.2f}, {high:.2f}]"


def _verdict(goal: Mapping[str, Any]) -> list[str]:
    bound = f"≥ {goal['threshold']}" if "threshold" in goal else f"≤ {goal['limit']}"
    return [f"{goal['value']:g}", bound, "yes" if goal["met"] else "no"]


def _kib(count: int) -> str:
    return f"{count / 1024:,.0f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
