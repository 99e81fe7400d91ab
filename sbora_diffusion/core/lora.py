"""Concepts as an ordinary LoRA: the one-hot factor is written out, which changes no value of ΔW.

Ranks of several concepts stand side by side, so their product is the sum of the concepts' updates.
Where a layer has disjoint columns (FA) or rows (FB), every entry of up @ down is one product beside
zeros: the LoRA gives the fold's own ΔW, bit for bit in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.core.concept import Concept, refuse_extras
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.folded_set import Weighted, refuse_bad_weight
from sbora_diffusion.core.functional import Variant, one_hot, scaling


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """ΔW = scale · up @ down of one layer.

    Attributes:
        down: A, (R, in), R being the sum of the ranks.
        up: B, (out, R).
        scale: alpha / R.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def delta(self) -> Tensor:
        """ΔW, (out, in), fp32; a convolution's kernel is flattened into its inputs."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))

    def to(self, dtype: torch.dtype) -> "LoraLayer":
        """The factors rounded.

        Raises:
            NonFiniteError: a number does not fit into `dtype`.
        """
        rounded = LoraLayer(self.down.to(dtype), self.up.to(dtype), self.scale)
        if not (rounded.down.isfinite().all() and rounded.up.isfinite().all()):
            raise NonFiniteError(
                f"a factor of the LoRA does not fit into {dtype}", "lower the weights or use fp32"
            )
        return rounded


def lora_layers(concepts: Sequence[Weighted], unit_scale: bool = False) -> dict[str, LoraLayer]:
    """One LoRA with scale · up @ down = Σ λ·scale·ΔW_i, in fp32.

    Each concept, in the order of the digests, has the same ranks in every layer, zeros where it
    leaves a layer alone: some readers lose ranks and alphas that differ between layers. Trained
    factors are kept as they are. One concept's λ·alpha / rank is the LoRA's own scale; of several,
    each one's stands in its fixed factor.

    Args:
        unit_scale: put the scale into the fixed factor for one concept too, for formats that have
            no alpha.

    Returns:
        Each layer's LoRA, under its canonical name.

    Raises:
        ConfigError: a weight λ is not finite.
        FormatError: see `refuse_extras`.
    """
    inside = unit_scale or len(concepts) > 1
    parts: dict[str, dict[int, LoraLayer]] = {}
    rank, scale = 0, 1.0
    for concept, weight in sorted(concepts, key=lambda pair: pair[0].meta.digest):
        refuse_bad_weight(weight)
        refuse_extras(concept)
        scale = scaling(concept.meta.alpha, concept.meta.rank, weight)
        for layer in concept.layers:
            part = _materialised(concept, layer, scale if inside else 1.0)
            parts.setdefault(layer, {})[rank] = part
        rank += concept.meta.rank
    scale = 1.0 if inside else scale
    return {layer: _side_by_side(own, rank, scale) for layer, own in parts.items()}


def _side_by_side(parts: dict[int, LoraLayer], rank: int, scale: float) -> LoraLayer:
    """The parts at the ranks where each begins."""
    inputs, outputs = next((p.down.shape[1], p.up.shape[0]) for p in parts.values())
    down, up = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    for first, part in parts.items():
        down[first : first + part.rank] = part.down
        up[:, first : first + part.rank] = part.up
    return LoraLayer(down, up, scale)


def _materialised(concept: Concept, layer: str, scale: float) -> LoraLayer:
    """One concept's share of a layer, with `scale` in place of the ones of its fixed factor."""
    stored, meta = concept.layers[layer], concept.meta
    return lora_pair(meta.variant, stored.indices, stored.factor, meta.widths[layer], scale)


def lora_pair(
    variant: Variant, indices: Tensor, factor: Tensor, width: int, scale: float = 1.0
) -> LoraLayer:
    """A trained factor and the fixed one written out, with `scale` in place of its ones.

    Args:
        width: inputs (FA) or outputs (FB) of the layer.
    """
    fixed, trained = one_hot(indices, width).float() * scale, factor.float()  # fixed: (r, width)
    return LoraLayer(fixed, trained) if variant == "fa" else LoraLayer(trained, fixed.T)
