"""Means and intervals of lines, by category of the concepts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from sbora_diffusion.comparison.lines import Line
from sbora_diffusion.evaluation.intervals import bootstrap

CATEGORIES = ("character", "object")
Value = Callable[[Line], float | None]
"""A line's figure; None where it is broken."""


@dataclass(frozen=True)
class Figure:
    """A mean over concepts.

    Attributes:
        interval: 95 %, over the concepts, each with the mean of its seeds; None for a single one.
        broken: lines that have no figure and do not count.
    """

    value: float
    interval: tuple[float, float] | None
    of: int
    broken: int = 0


def by_concept(lines: Sequence[Line], value: Value) -> dict[str, tuple[str, float]]:
    """Concept → its category, and its mean over the seeds; missing if all are broken."""
    found: dict[str, list[float]] = {}
    for line in lines:
        figure = value(line)
        if figure is not None:
            found.setdefault(line["concept"], []).append(figure)
    categories = {line["concept"]: line["category"] for line in lines}
    return {concept: (categories[concept], fmean(values)) for concept, values in found.items()}


def by_category(lines: Sequence[Line], value: Value) -> dict[str, Figure]:
    """Category → figure, and "mean": that of the categories' means, as the paper has it.

    Without a concept of one category that one is missing, and the mean is the other's.
    """
    concepts = by_concept(lines, value)
    found = {}
    for category in CATEGORIES:
        values = [v for own, v in concepts.values() if own == category]
        if values:
            broken = _broken([x for x in lines if x["category"] == category], value)
            found[category] = _figure([(v, 1.0, 0.0) for v in values], broken)
    if concepts:
        found["mean"] = balanced(concepts, _broken(lines, value))
    return found


def balanced(concepts: Mapping[str, tuple[str, float]], broken: int = 0) -> Figure:
    """The mean of the categories' means.

    Args:
        concepts: name → category and value; at least one.
        broken: what the figure says of itself.
    """
    rows = [(v, float(c == CATEGORIES[0]), float(c != CATEGORIES[0])) for c, v in concepts.values()]
    return _figure(rows, broken)


def paired(
    ours: Mapping[str, tuple[str, float]], theirs: Mapping[str, tuple[str, float]]
) -> Figure | None:
    """The first minus the second, concept by concept; None if they have none in common."""
    both = {n: (c, v - theirs[n][1]) for n, (c, v) in ours.items() if n in theirs}
    return balanced(both) if both else None


def _figure(rows: Sequence[tuple[float, float, float]], broken: int) -> Figure:
    """Rows of (value, is of the first category, is of the second)."""
    value = float(_means(np.asarray(rows, dtype=float)[None])[0])
    interval = bootstrap(rows, _means)
    return Figure(value, (interval[0], interval[1]) if interval else None, len(rows), broken)


def _means(drawn: np.ndarray) -> np.ndarray:
    """(R, N, 3) → (R,): the mean of the means of those categories that any of the rows has."""
    values, members = drawn[..., :1], drawn[..., 1:]
    counts = members.sum(1)
    with np.errstate(invalid="ignore"):
        means = (values * members).sum(1) / counts
    return np.nanmean(means, axis=1)


def _broken(lines: Sequence[Line], value: Value) -> int:
    return sum(value(line) is None for line in lines)
