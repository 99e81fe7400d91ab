"""Which sets of concepts are merged, and how the concepts are trained."""

import random
from collections.abc import Sequence
from itertools import cycle, islice

SETS = 24
SIZES = (2, 3, 4, 5, 6, 8, 10, 12)
"""Of the sets, in turn; the last set has all concepts."""
RULE_SEED = 1
TRAINING = {
    "rate_unet": 3e-3,
    "rate_text_encoder": 2e-3,
    "preservation": 1.0,
    "batch_size": 8,
}
"""What differs from the default recipe."""


def drawn_sets(names: Sequence[str], count: int, seed: int = RULE_SEED) -> list[tuple[str, ...]]:
    """Random sets, each in the order of `names`.

    Args:
        names: at least two.
    """
    rng = random.Random(seed)
    sizes = [*islice(cycle(SIZES), count - 1), len(names)]
    chosen = [set(rng.sample(list(names), min(size, len(names)))) for size in sizes]
    return [tuple(name for name in names if name in one) for one in chosen]
