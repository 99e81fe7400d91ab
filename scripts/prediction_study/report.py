"""The record: what was predicted beside what was lost, over all random sets."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from merging_study.statistics import mean_figure
from study_options import FIGURES

from prediction_study.statistics import relation
from sbora_diffusion.core.prediction import ADDED, CALIBRATED

WHAT = (
    "what `sbora check` predicts from second moments, and what concepts lose in random sets merged "
    "calibrated and plainly, against each alone"
)
BOTH = "image_alignment"
"""The mean of both image features."""
LOSSES = (*FIGURES, BOTH)
Points = Sequence[Sequence[Mapping[str, Any]]]
"""Of each set, its concepts: what was predicted, and what was lost."""


def record_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record.

    Args:
        parts: of the runs, which have trained or read the same concepts.
    """
    first = parts[0]
    sets = sorted(
        ((part["alone"], one) for part in parts for one in part["sets"]),
        key=lambda pair: pair[1]["number"],
    )
    return {
        "what": WHAT,
        **{key: first["run"][key] for key in ("date", "commit", "device", "versions")},
        **{key: first[key] for key in ("training", "calibration", "rule_seed")},
        "subjects": list(first["alone"]),
        "alone": {k: mean_figure([e[k] for e in first["alone"].values()]) for k in FIGURES},
        "sets": [one["concepts"] for _, one in sets],
        "seconds_of_prediction": round(mean(one["ways"]["seconds"] for _, one in sets), 2),
        "ways": {way: _way(sets, way) for way in (CALIBRATED, ADDED)},
        "runs": [part["run"] for part in parts],
    }


def _way(sets: Sequence[tuple[Mapping, Mapping]], way: str) -> dict[str, Any]:
    """One way of merging. Sets with a picture that was not finite have no points."""
    points = [_points(alone, one["concepts"], one["ways"][way]) for alone, one in sets]
    every = [point for one in points for point in one]
    names = list(every[0]["predictors"]) if every else []
    predictors = {name: _relations(points, name) for name in names}
    return {
        "broken_sets": sum(not one for one in points),
        "loss": {k: mean_figure([p["loss"][k] for p in every]) for k in LOSSES} if every else None,
        "predictors": predictors,
        "best": _best(points, names),
        "unrelated_prompts": _unrelated([one["ways"][way] for _, one in sets]),
        "points": [{**point, "set": k} for k, one in enumerate(points) for point in one],
    }


def _points(
    alone: Mapping[str, Mapping[str, float]], concepts: Sequence[str], found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    if found["each"] is None:
        return []
    points = []
    for name in concepts:
        loss = {k: alone[name][k] - found["each"][name][k] for k in FIGURES}
        loss[BOTH] = mean(loss[k] for k in FIGURES[1:])
        predicted = found["predictors"][name]
        points.append({"concept": name, "predictors": _rounded(predicted), "loss": _rounded(loss)})
    return points


def _relations(points: Points, name: str) -> dict[str, Any]:
    """How losses follow one predictor, concept by concept and in the mean of each set."""
    return {
        "concepts": {k: relation(_pairs(points, name, k)) for k in LOSSES},
        "set_means": {k: relation(_means(_pairs(points, name, k))) for k in LOSSES},
    }


def _best(points: Points, names: Sequence[str]) -> dict[str, Any] | None:
    """The predictor with the highest correlation in every second set, and how it does in the
    others, for which it was not chosen."""
    chosen_on, held_out = points[::2], points[1::2]

    def correlation(name: str) -> float:
        return relation(_pairs(chosen_on, name, BOTH))["pearson"]["value"] or 0.0

    if not names or not any(held_out):
        return None
    name = max(names, key=correlation)
    return {
        "predictor": name,
        "chosen_on": round(correlation(name), 4),
        "held_out_sets": {k: relation(_pairs(held_out, name, k)) for k in LOSSES},
        "held_out_set_means": relation(_means(_pairs(held_out, name, BOTH))),
    }


def _unrelated(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted change of layers' outputs on prompts without a concept, and of their pictures."""
    known = [one for one in found if one["distance"] is not None]
    return {
        name: relation([[(one["generic"], one["distance"][name])] for one in known])
        for name in FIGURES[1:]
    }


def _pairs(points: Points, name: str, loss: str) -> list[list[tuple[float, float]]]:
    """Without points that a predictor says nothing about."""
    return [
        [
            (point["predictors"][name], point["loss"][loss])
            for point in one
            if point["predictors"][name] is not None
        ]
        for one in points
    ]


def _means(sets: Sequence[Sequence[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    return [[(mean(x for x, _ in one), mean(y for _, y in one))] for one in sets if one]


def _rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else round(v, 5) for k, v in values.items()}


def line(way: str, found: Mapping[str, Any]) -> str:
    """The best predictor in words, with the entry that `LOSSES` would have."""
    best = found["best"]
    if best is None:
        return f"{way}: no points"
    both = best["held_out_sets"][BOTH]
    slope, intercept, pearson, spearman = (
        both[figure]["value"] for figure in ("slope", "intercept", "pearson", "spearman")
    )
    means = best["held_out_set_means"]["pearson"]["value"]
    return (
        f"{way}: {best['predictor']}, in the other sets Pearson {pearson}, Spearman {spearman}, "
        f"of set means {means}; Loss({best['predictor']!r}, {slope}, {intercept}, {pearson}, "
        f"{found['loss'][BOTH]['value']})"
    )
