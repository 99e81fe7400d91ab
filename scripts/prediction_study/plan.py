"""Which sets of concepts are merged."""

import random
from collections.abc import Sequence
from itertools import cycle, islice

SETS = 24
SIZES = (2, 3, 4, 5, 6, 8, 10, 12)
"""Of the sets, in turn; the last set has all concepts."""
RULE_SEED = 1


def drawn_sets(names: Sequence[str], count: int, seed: int = RULE_SEED) -> list[tuple[str, ...]]:
    """Random sets, each in the order of `names`.

    Args:
        names: at least two.
    """
    rng = random.Random(seed)
    sizes = [*islice(cycle(SIZES), count - 1), len(names)]
    chosen = [set(rng.sample(list(names), min(size, len(names)))) for size in sizes]
    return [tuple(name for name in names if name in one) for one in chosen]
