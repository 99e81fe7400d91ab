"""Does each region show its own concept rather than the other one? Pure functions of similarities.

Rows are crops, two of each picture, the left one first; the two lines of `labels` are the number of
each crop's own concept and of the other one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from torch import Tensor

from pair_study.plan import Pair
from sbora_diffusion.evaluation.metrics import similarity
from sbora_diffusion.records import at_least

THRESHOLD = 0.90
RESAMPLES, SHUFFLES = 2000, 200
Array = np.ndarray


def to_concepts(
    crops: Tensor, references: Sequence[Tensor], left_out: Array | None = None
) -> Array:
    """Mean cosine of each crop with the references of each concept, (N, D) → (N, K).

    Args:
        references: (M_k, D) of each of the K concepts.
        left_out: (N, K), the number of a reference that does not count for that crop, −1 for none.
    """
    means = np.empty((len(crops), len(references)))
    for k, features in enumerate(references):
        cosines = similarity(crops, features).double().numpy()
        counts = np.ones_like(cosines)
        if left_out is not None:
            counts -= np.arange(len(features)) == left_out[:, k : k + 1]
        means[:, k] = (cosines * counts).sum(1) / counts.sum(1)
    return means


def labels_of(orders: Sequence[Pair], names: Sequence[str]) -> Array:
    """(2, crops): each picture's names as (left, right) → own and other of its two crops."""
    numbers = np.array([[names.index(name) for name in order] for order in orders])
    return np.stack([numbers.reshape(-1), numbers[:, ::-1].reshape(-1)])


def margins(means: Array, labels: Array) -> Array:
    """(N,): cosine with the own concept minus cosine with the other one."""
    rows = np.arange(len(means))
    return means[rows, labels[0]] - means[rows, labels[1]]


def best_assignment(right: Array) -> Array:
    """Right crops of each picture, (N,) → (N/2,), after exchanging its sides where that is better.

    With one concept against one other, exchanging makes right crops wrong and wrong ones right.
    """
    found = right.reshape(-1, 2).mean(1)
    return np.maximum(found, 1 - found)


def per_pair(values: Array, pairs: int) -> Array:
    """Mean of each pair, whose values lie together, as many for each."""
    return values.reshape(pairs, -1).mean(1)


def interval(values: Array, rng: Generator) -> list[float]:
    """95 % of the means of resampled pairs (percentile bootstrap)."""
    rows = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return [round(float(q), 4) for q in np.quantile(values[rows].mean(1), (0.025, 0.975))]


def shuffled(means: Array, labels: Array, rng: Generator) -> dict[str, Any]:
    """The share when crops are judged by the labels of other crops: half of them by chance."""
    shares = [
        (margins(means, labels[:, rng.permutation(len(means))]) > 0).mean() for _ in range(SHUFFLES)
    ]
    low, high = np.quantile(shares, (0.025, 0.975))
    return {
        "value": round(float(np.mean(shares)), 4),
        "standard_deviation": round(float(np.std(shares)), 4),
        "middle_95_percent": [round(float(low), 4), round(float(high), 4)],
        "shuffles": SHUFFLES,
    }


def figures(
    means: Array, labels: Array, within: Array, seed: int, threshold: float | None = None
) -> dict[str, Any]:
    """All figures of one condition under one judge.

    Args:
        means: (N, K), the crops of a pair together, as many for each.
        within: (pairs,), whether both concepts are of one category.
    """
    margin = margins(means, labels)
    right, count = margin > 0, len(within)
    pair_shares = per_pair(right, count)
    rng = np.random.default_rng(seed)
    share = _share(pair_shares, rng)
    if threshold is not None:
        share |= at_least(float(right.mean()), threshold)
    return {
        "own_concept_scores_higher": {**share, "of": len(right)},
        "within_one_category": _group(pair_shares[within], rng),
        "across_categories": _group(pair_shares[~within], rng),
        "both_regions_right": _share(per_pair(right.reshape(-1, 2).all(1), count), rng),
        "best_assignment": {**_share(per_pair(best_assignment(right), count), rng), "chance": 0.75},
        "margin": _share(per_pair(margin, count), rng),
        "labels_shuffled": shuffled(means, labels, rng),
    }


def _share(values: Array, rng: Generator) -> dict[str, Any]:
    return {"value": round(float(values.mean()), 4), "interval": interval(values, rng)}


def _group(values: Array, rng: Generator) -> dict[str, Any] | None:
    return {**_share(values, rng), "pairs": len(values)} if len(values) else None
