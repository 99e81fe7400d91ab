"""What the others' updates are made of on a concept's own activations, layer by layer.

With x what a layer reads while concept i runs alone, and U = Σ_{q≠i} ΔW_q, the energy is E‖U x‖².
Moments of x are enough for all of it: E‖U x‖² = tr(U E[x xᵀ] Uᵀ).
"""

from collections.abc import Mapping

import torch
from crosstalk_study.plan import EVERY, layer_group
from torch import Tensor

from sbora_diffusion.core.mixed import Bank

OUTLIERS = 0.01
"""Of the channels that updates read, at least one: those with the largest mean squares."""
PARTS = ("own", "others", "constant", "common", "outliers")
"""Energy of the concept's own update, and of the others'; of the latter what the mean activation of
this concept's rows gives, what subtracting the mean over all concepts' rows takes away, and what
setting the outlier channels to 0 takes away."""


class Inputs:
    """Moments of what layers read, concept by concept; every position counts alike.

    Args:
        count: of concepts; rows of a batch stand in their order, as many of each.

    Attributes:
        second: layer → (count, in, in), fp64, summed.
        first: layer → (count, in), fp64, summed.
        seen: layer → positions of each concept.
    """

    def __init__(self, count: int):
        self._count = count
        self.second: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Count a layer's input (rows, ..., in)."""
        rows = x.detach().double().reshape(self._count, -1, x.shape[-1])
        self.second[name] = self.second.get(name, 0) + rows.mT @ rows
        self.first[name] = self.first.get(name, 0) + rows.sum(1)
        self.seen[name] = self.seen.get(name, 0) + rows.shape[1]

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """E[x xᵀ], (count, in, in), and E[x], (count, in)."""
        return self.second[name] / self.seen[name], self.first[name] / self.seen[name]


def dense(bank: Bank, in_features: int, out_features: int) -> Tensor:
    """ΔW of each entry, (C, out, in), fp64."""
    shape = len(bank.indices), out_features, in_features
    found = bank.factor.new_zeros(shape, dtype=torch.float64)
    scale = bank.scale.double()
    if bank.variant == "fa":
        at = bank.indices[:, None].expand(-1, out_features, -1)
        return found.scatter_add(2, at, bank.factor.double() * scale[:, None])
    at = bank.indices[:, :, None].expand(-1, -1, in_features)
    return found.scatter_add(1, at, bank.factor.double() * scale[:, :, None])


def layer_parts(updates: Tensor, second: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Energies in one layer, each (C,), see `PARTS`.

    Args:
        updates: ΔW of each concept, (C, out, in).
        second: E[x xᵀ] of each concept's rows, (C, in, in).
        mean: E[x] of each concept's rows, (C, in).
    """
    others = updates.sum(0) - updates
    total, constant = energy(others, second), others @ mean[:, :, None]
    common = others @ mean.mean(0)[:, None]
    kept = others * ~outliers(others, second)[:, None]
    found = (
        energy(updates, second),
        total,
        constant.square().sum((1, 2)),
        (2 * constant * common - common.square()).sum((1, 2)),
        total - energy(kept, second),
    )
    return dict(zip(PARTS, found, strict=True))


def energy(updates: Tensor, second: Tensor) -> Tensor:
    """E‖ΔW x‖², (C,)."""
    return (updates @ second * updates).sum((1, 2))


def outliers(updates: Tensor, second: Tensor) -> Tensor:
    """(C, in): the loudest channels of those that the updates read at all, which for FA are the
    columns that the others own, for FB all."""
    read = (updates != 0).any(1)
    squares = second.diagonal(dim1=1, dim2=2).masked_fill(~read, -1.0)
    count = max(1, round(OUTLIERS * int(read.sum(1).max())))
    chosen = torch.zeros_like(read)
    return chosen.scatter(1, squares.topk(count, dim=1).indices, True) & read


def parts_by_group(
    banks: Mapping[str, Bank], shapes: Mapping[str, tuple[int, int]], inputs: Inputs
) -> dict[str, dict[str, list[float]]]:
    """Group of layers → part → energy of each concept, summed over the group's layers.

    Args:
        shapes: layer → (out, in).
    """
    sums: dict[str, dict[str, Tensor]] = {}
    for name, bank in banks.items():
        out_features, in_features = shapes[name]
        updates = dense(bank, in_features, out_features)
        group = sums.setdefault(layer_group(name), {})
        for part, values in layer_parts(updates, *inputs.moments(name)).items():
            group[part] = group.get(part, 0) + values
    return {
        group: {part: values.tolist() for part, values in sums[group].items()}
        for group in EVERY
        if group in sums
    }
