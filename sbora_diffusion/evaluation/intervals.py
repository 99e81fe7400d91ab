"""Intervals of means over a few concepts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES, SEED = 10_000, 0
Values = Sequence[float]


def bootstrap(
    rows: Sequence[Any], statistic: Callable[[np.ndarray], np.ndarray]
) -> list[float] | None:
    """95 % percentile interval of a statistic over resampled rows (Efron 1979).

    Args:
        rows: (N, …), what is drawn from with replacement.
        statistic: (R, N, …) → (R,), one value for each resample; those that are NaN are left out.

    Returns:
        The two bounds; None for fewer than two rows, or if no resample has a value.
    """
    if len(rows) < 2:
        return None
    draws = np.random.default_rng(SEED).integers(len(rows), size=(RESAMPLES, len(rows)))
    found = statistic(np.asarray(rows, dtype=float)[draws])
    found = found[~np.isnan(found)]
    return [round(float(b), 4) for b in np.quantile(found, (0.025, 0.975))] if len(found) else None


def mean_figure(values: Values) -> dict[str, Any]:
    """Mean over concepts with its interval."""
    interval = bootstrap(values, lambda drawn: drawn.mean(1))
    return {"value": round(sum(values) / len(values), 4), "interval": interval, "of": len(values)}
