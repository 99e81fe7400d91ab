"""How far what two runs gave is apart."""

from collections.abc import Mapping

from torch import Tensor


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖B − B′‖ / ‖B‖ over all factors."""
    pairs = [(factor.double(), other[name].double()) for name, factor in one.items()]
    squares = sum((a - b).square().sum().item() for a, b in pairs)
    return float((squares / sum(a.square().sum().item() for a, _ in pairs)) ** 0.5)
