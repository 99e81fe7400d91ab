"""Rank correlation of a few dozen figures, and the intervals of `evaluation.intervals`."""

import math
from typing import Any

import numpy as np

from sbora_diffusion.evaluation.intervals import Values, bootstrap, mean_figure

__all__ = ["bootstrap", "mean_figure", "rank_correlation", "ranks_of"]


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
