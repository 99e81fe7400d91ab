"""How loud one concept is on another's activations: ‖ΔW_q X_p‖ / ‖ΔW_p X_p‖, layer by layer.

Disjoint indices make merging exact, not silent: an FA concept reads r coordinates that are not zero
on other prompts, an FB concept adds to r outputs whatever they are for. X_p are the inputs of a
layer while the model runs the prompts of concept p with p alone; norms are root mean squares over
them, for which their second moments are enough (`core/energies.py`). A ratio of 0 means that q is
silent where p speaks, 1 that both are equally loud.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Crosstalk:
    """Norms of every concept's update on every concept's own activations.

    Attributes:
        names: of the P concepts.
        layers: canonical names of the L layers that any of them adapts.
        norms: (P, P, L) fp64; [p, q, l] is ‖ΔW_q X_p‖ in layer l, NaN where q does not adapt it.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    norms: Tensor

    def ratios(self) -> Tensor:
        """‖ΔW_q X_p‖ / ‖ΔW_p X_p‖, (P, P, L); NaN where p or q has no update, or p's is zero."""
        own = self.norms.diagonal(dim1=0, dim2=1).T  # (P, L)
        ratios = self.norms / own[:, None]
        return ratios.where((own > 0)[:, None], torch.nan)

    def rms(self) -> Tensor:
        """Root mean square over the layers that p and q share, (P, P); NaN if they share none."""
        return self.ratios().square().nanmean(dim=2).sqrt()

    def worst(self, p: int, q: int) -> tuple[str, float] | None:
        """The layer in which q is loudest on p's prompts, and the ratio; None if none is shared."""
        ratios = self.ratios()[p, q]
        if ratios.isnan().all():
            return None
        layer = int(ratios.nan_to_num(-1.0).argmax())
        return self.layers[layer], ratios[layer].item()

    def grouped(self, group_of: Callable[[str], str]) -> dict[str, Tensor]:
        """`rms` within each group of layers, by the groups' names in order."""
        groups: dict[str, list[int]] = {}
        for number, layer in enumerate(self.layers):
            groups.setdefault(group_of(layer), []).append(number)
        ratios = self.ratios()
        return {
            name: ratios[:, :, groups[name]].square().nanmean(dim=2).sqrt()
            for name in sorted(groups)
        }


def from_norms(names: Sequence[str], norms: Sequence[Mapping[tuple[int, str], float]]) -> Crosstalk:
    """Put measured norms together.

    Args:
        names: of the P concepts.
        norms: for each p, (q, layer) → ‖ΔW_q X_p‖.
    """
    layers = sorted({layer for measured in norms for _, layer in measured})
    table = torch.full((len(names), len(names), len(layers)), torch.nan, dtype=torch.float64)
    for p, measured in enumerate(norms):
        for (q, layer), norm in measured.items():
            table[p, q, layers.index(layer)] = norm
    return Crosstalk(tuple(names), tuple(layers), table)
