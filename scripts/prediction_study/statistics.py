"""Correlations and lines of points that come in sets, with intervals over the sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from merging_study.statistics import ranks_of

RESAMPLES, SEED = 1000, 0
FIGURES = ("pearson", "spearman", "slope", "intercept")


def relation(sets: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """How y follows x: both correlations, and the least-squares line.

    Args:
        sets: (x, y) of each set's points. Sets are resampled as wholes for the 95 % percentile
            intervals (Efron 1979), since the points of one share their model; resamples in which a
            figure does not exist are left out.

    Returns:
        Figure → value and interval, None where x (for a correlation, also y) is constant.
    """
    known = [np.asarray(one, dtype=float) for one in sets if len(one)]
    values = _figures(np.concatenate(known)) if known else dict.fromkeys(FIGURES)
    rng = np.random.default_rng(SEED)
    drawn = [
        _figures(np.concatenate([known[k] for k in rng.integers(len(known), size=len(known))]))
        for _ in range(RESAMPLES if len(known) > 1 else 0)
    ]
    return {
        **{k: {"value": _rounded(values[k]), "interval": _interval(drawn, k)} for k in FIGURES},
        "points": sum(map(len, known)),
        "sets": len(known),
    }


def _figures(points: np.ndarray) -> dict[str, float | None]:
    x, y = points.T
    deviation = x - x.mean()
    if len(points) < 2 or not deviation.any():
        return dict.fromkeys(FIGURES)
    slope = float(deviation @ (y - y.mean()) / (deviation @ deviation))
    return {
        "pearson": _pearson(x, y),
        "spearman": _pearson(ranks_of(x), ranks_of(y)),
        "slope": slope,
        "intercept": float(y.mean() - slope * x.mean()),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else None


def _interval(drawn: Sequence[dict[str, float | None]], figure: str) -> list[float] | None:
    found = [one[figure] for one in drawn if one[figure] is not None]
    return [round(float(b), 4) for b in np.quantile(found, (0.025, 0.975))] if found else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
