"""Writing single updates again after each optimizer step: the bytes of `merging.fold`, for less.

What does not change between the steps is prepared once. A write is then three operations on the
entries of all layers, which a GPU does in a few kernels, and one that puts them into the weights.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter, is_

import torch
from torch import Tensor

from sbora_diffusion.core.strips import Strips, capturing
from sbora_diffusion.core.updates import Update


class Rewrite:
    """One update, alone in a weight, whose factor goes on changing in place.

    Args:
        weight: (out, in).
        update: folded into the weight.
        original: the unfolded weight's entries there, in the shape of the factor.

    Attributes:
        kind: what layers have in common that are written together.
    """

    def __init__(self, weight: Tensor, update: Update, original: Tensor) -> None:
        self.weight, self.update, self.original = weight, update, original
        self.indices = update.index(weight.device)
        self.kind = str(weight.device), str(weight.dtype), str(update.factor.dtype), update.dim


class Rewriting:
    """Writes lists of layers, and stays prepared for the last one."""

    def __init__(self) -> None:
        self._rewrites: list[Rewrite] = []
        self._groups: list[_Group] = []

    @torch.no_grad()
    def write(self, rewrites: Sequence[Rewrite]) -> None:
        """Write cast(fp32(W0) + scale · factor) for the factors as they are now; nothing is
        checked."""
        if len(rewrites) != len(self._rewrites) or not all(map(is_, rewrites, self._rewrites)):
            groups = _groups(rewrites)
            # What is prepared in a recording holds nothing until this is replayed.
            if not any(capturing(one.weight.device) for one in rewrites[:1]):
                self._rewrites, self._groups = list(rewrites), groups
        else:
            groups = self._groups
        for group in groups:
            group.write()


class _Group:
    """Layers of one kind.

    Attributes:
        originals: flat as all of these, in the dtype of the sum.
        totals: where new entries are summed, and each layer's `parts` of them.
        rounded: where they are rounded to the weights' dtype.
    """

    def __init__(self, rewrites: list[Rewrite]) -> None:
        self.rewrites = rewrites
        weights = [one.weight for one in rewrites]
        dim, indices = rewrites[0].update.dim, [one.indices for one in rewrites]
        self.strips = Strips(dim, weights, indices)
        self.wide = torch.promote_types(weights[0].dtype, torch.float32)
        self.originals = self.strips.empty(self.wide)
        originals = [one.original for one in rewrites]
        torch._foreach_copy_(self.strips.views(self.originals), originals)
        # `fold` sums from zero, which makes a −0 a +0; adding to a +0 does the same.
        self.originals.add_(0.0)
        self.totals = self.strips.empty(self.wide)
        self.parts = self.strips.views(self.totals)
        self.rounded = self.strips.empty()

    def write(self) -> None:
        self.totals.copy_(self.originals)
        torch._foreach_add_(self.parts, self._scaled())
        self.strips.write(self.rounded.copy_(self.totals))

    def _scaled(self) -> list[Tensor]:
        """scale · factor of each, in at least fp32, then in the dtype of the sum."""
        factors = [one.update.factor for one in self.rewrites]
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        scaled, scales = [f.to(wide) for f in factors], [one.update.scale for one in self.rewrites]
        if any(scale != 1.0 for scale in scales):
            scaled = list(torch._foreach_mul(scaled, scales))
        return [factor.to(self.wide) for factor in scaled]


def _groups(rewrites: Sequence[Rewrite]) -> list[_Group]:
    kind = attrgetter("kind")
    return [_Group(list(group)) for _, group in groupby(sorted(rewrites, key=kind), key=kind)]
