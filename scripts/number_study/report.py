"""The record of figures against the number of concepts."""

from collections.abc import Mapping, Sequence
from typing import Any

from merging_study.statistics import mean_figure
from study_options import FIGURES

from number_study.plan import trainings

WHAT = "alignment of concepts in one model against their number, by method"
CLASS_WORD = "class word"
STRONG = 0.1
"""How far, in both image features, a strong concept alone lies above its bare class word."""

Figures = Mapping[str, Mapping[str, float]]
"""Subject → figures."""


def record_of(bound: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole record.

    Args:
        bound: what was found of class words.
        files: what was found of each training and seed.
    """
    by_training: dict[str, list[Mapping[str, Any]]] = {}
    for found in sorted(files, key=lambda found: found["seed"]):
        by_training.setdefault(found["training"], []).append(found)
    order = [name for name in trainings({}, {}, {}) if name in by_training]
    words = bound["alone"]
    return {
        "what": WHAT,
        **{key: bound["run"][key] for key in ("date", "commit", "device", "versions")},
        "subjects": list(words),
        "class_word": _means(words, list(words)),
        "trainings": {name: _training(by_training[name], words) for name in order},
        "methods": [
            _method(method, by_training[name], words)
            for name in order
            for method in by_training[name][0]["merged"]
        ],
        "runs": [bound["run"], *(found["run"] for name in order for found in by_training[name])],
    }


def _training(runs: Sequence[Mapping[str, Any]], words: Figures) -> dict[str, Any]:
    """What is known of concepts that were trained in one way, each alone."""
    alone = _over_seeds([found["alone"] for found in runs])
    return {
        "about": runs[0]["about"],
        "config": {key: value for key, value in runs[0]["config"].items() if key != "seed"},
        "seeds": [found["seed"] for found in runs],
        "training_seconds": max(found["training_seconds"] for found in runs),
        "alone": _means(alone, list(alone)),
        "strong": _strong(alone, words),
    }


def _method(name: str, runs: Sequence[Mapping[str, Any]], words: Figures) -> dict[str, Any]:
    """A training's concepts, merged in one way."""
    alone = _over_seeds([found["alone"] for found in runs])
    strong = _strong(alone, words)
    points = zip(*(found["merged"][name] for found in runs), strict=True)
    return {
        "method": name,
        "training": runs[0]["training"],
        "merge": runs[0]["merges"][name],
        "curve": [_point(list(point), alone, strong) for point in points],
    }


def _point(
    seeds: Sequence[Mapping[str, Any]], alone: Figures, strong: Sequence[str]
) -> dict[str, Any]:
    """So many concepts in one model."""
    (count,) = {point["concepts"] for point in seeds}
    if broken := [point["broken"] for point in seeds if point["each"] is None]:
        return {"concepts": count, "broken": broken[0]}
    each = _over_seeds([point["each"] for point in seeds])
    change = {c: {k: each[c][k] - alone[c][k] for k in FIGURES} for c in each}
    return {
        "concepts": count,
        "seconds": max(point["seconds"] for point in seeds),
        "value": _means(each, list(each)),
        "change": _means(change, list(each)),
        "change_of_strong": _means(change, [c for c in each if c in strong]),
        "worst": {k: round(min(change[c][k] for c in change), 4) for k in FIGURES},
    }


def _strong(alone: Figures, words: Figures) -> list[str]:
    return [
        subject
        for subject, figures in alone.items()
        if all(figures[k] - words[subject][k] >= STRONG for k in FIGURES[1:])
    ]


def _over_seeds(runs: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Subject → mean figures."""
    return {
        subject: {k: sum(found[subject][k] for found in runs) / len(runs) for k in FIGURES}
        for subject in runs[0]
    }


def _means(figures: Figures, subjects: Sequence[str]) -> dict[str, Any] | None:
    """Means over some subjects with their intervals; None without any."""
    if not subjects:
        return None
    return {k: mean_figure([figures[subject][k] for subject in subjects]) for k in FIGURES}


def line(method: Mapping[str, Any]) -> str:
    """A method's changes, as they are read in a terminal."""
    points = [
        f"{point['concepts']}: "
        + ("broken" if "broken" in point else _signed([point["change"][k] for k in FIGURES]))
        for point in method["curve"]
    ]
    return f"{method['method']:28} " + " | ".join(points)


def _signed(figures: Sequence[Mapping[str, float]]) -> str:
    return " ".join(f"{figure['value']:+.3f}" for figure in figures)
