"""Intervals and rank correlation of a few dozen figures."""

import math
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


def rank_correlation(first: Values, second: Values) -> dict[str, Any]:
    """Spearman's ρ with its interval over resampled pairs; None where one side is constant."""
    pairs = list(zip(first, second, strict=True))
    value = float(_spearman(np.asarray(pairs, dtype=float)[None])[0])
    return {
        "value": None if math.isnan(value) else round(value, 4),
        "interval": bootstrap(pairs, _spearman),
        "of": len(pairs),
    }


def _spearman(pairs: np.ndarray) -> np.ndarray:
    """ρ of each sample, (R, N, 2) → (R,): Pearson's correlation of mid-ranks."""
    ranks = ranks_of(pairs.swapaxes(1, 2))
    ranks -= ranks.mean(2, keepdims=True)
    x, y = ranks[:, 0], ranks[:, 1]
    spread = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    with np.errstate(invalid="ignore"):
        return np.where(spread > 0, (x * y).sum(1), np.nan) / spread


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis from 1, equal values sharing their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal + 1) / 2
