"""An ordinary LoRA on a concept's indices: what of it fits there, and what is lost.

Of all updates that are zero outside the owned columns (FA) or rows (FB), the one nearest to ΔW in
the Frobenius norm has ΔW's own entries there; what is lost is the rest of ΔW.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sbora_diffusion.core.concept import Concept, sealed
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.layers import kind
from sbora_diffusion.core.lora import LoraLayer
from sbora_diffusion.core.schema import ConceptMeta, LayerFactor, validate_concept


@dataclass(frozen=True)
class Kept:
    """How much of ΔW is kept in some layers.

    Attributes:
        layers: how many of the LoRA's there are.
        matched: how many of these the concept adapts; of the others nothing is kept.
        total: Σ ‖ΔW‖².
        kept: Σ ‖ΔW‖² in the owned columns or rows.
    """

    layers: int = 0
    matched: int = 0
    total: float = 0.0
    kept: float = 0.0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            self.layers + other.layers,
            self.matched + other.matched,
            self.total + other.total,
            self.kept + other.kept,
        )

    @property
    def loss(self) -> float:
        """‖ΔW − what is kept‖ / ‖ΔW‖, 0 to 1."""
        if not self.total:
            return 0.0
        return max(0.0, 1.0 - self.kept / self.total) ** 0.5


@dataclass(frozen=True, eq=False)
class Projection:
    """A concept made of a LoRA.

    Attributes:
        kept: kind of layer to how much of the LoRA is kept there.
    """

    concept: Concept
    kept: Mapping[str, Kept]

    @property
    def overall(self) -> Kept:
        return sum(self.kept.values(), Kept())


def project(layers: Mapping[str, LoraLayer], onto: Concept, name: str) -> Projection:
    """The concept that is nearest to a LoRA, with the range, rank and alpha of another one.

    It has no tokens; its layers are those that both adapt.

    Args:
        layers: canonical name to LoRA.

    Raises:
        FormatError: no layer is adapted by both, or a layer has another shape.
        NonFiniteError: the LoRA has NaN or infinite values.
    """
    kept: dict[str, Kept] = {}
    found: dict[str, LayerFactor] = {}
    for layer, lora in sorted(layers.items()):
        total, part = energy(lora), 0.0
        if layer in onto.layers:
            found[layer], part = _projected(layer, lora, onto)
        own = Kept(1, int(layer in onto.layers), total, part)
        kept[kind(layer)] = kept.get(kind(layer), Kept()) + own
    if not found:
        raise FormatError(
            f"none of the LoRA's {len(layers)} layers is one that {onto.meta.name!r} adapts",
            "project it onto a concept of the same family",
        )
    concept = Concept(_meta(onto.meta, name, list(found)), found)
    validate_concept(concept)
    return Projection(sealed(concept), kept)


def energy(lora: LoraLayer) -> float:
    """‖ΔW‖² in fp64, from the factors: scale² · Σ (upᵀ up) ∘ (down downᵀ)."""
    down, up = lora.down.double().flatten(1), lora.up.double().flatten(1)
    return lora.scale**2 * ((up.T @ up) * (down @ down.T)).sum().item()


def _projected(layer: str, lora: LoraLayer, onto: Concept) -> tuple[LayerFactor, float]:
    """The factor that gives ΔW's entries at the owned indices, and ‖ΔW‖² there."""
    stored, meta = onto.layers[layer], onto.meta
    _refuse_other_shape(layer, lora, stored.factor, meta)
    at = stored.indices.long()
    down, up = lora.down.double(), lora.up.double()
    entries = up @ down[:, at] if meta.variant == "fa" else up[at] @ down
    entries = lora.scale * entries
    factor = LayerFactor(stored.indices, (entries / meta.scale).float())
    return factor, entries.square().sum().item()


def _refuse_other_shape(layer: str, lora: LoraLayer, factor: Tensor, meta: ConceptMeta) -> None:
    shape = (tuple(lora.up.shape)[:1], tuple(lora.down.shape)[1:])
    side, width = (factor.shape[0], meta.widths[layer])
    expected = ((side,), (width,)) if meta.variant == "fa" else ((width,), (factor.shape[1],))
    if lora.up.dim() != 2 or shape != expected:
        raise FormatError(
            f"{layer}: the LoRA is for {shape[0]} outputs and {shape[1]} inputs, the layer has "
            f"{expected[0]} and {expected[1]}",
            "project it onto a concept of the same base",
        )


def _meta(onto: ConceptMeta, name: str, layers: list[str]) -> ConceptMeta:
    changes = {
        "name": name,
        "tokens": (),
        "training": {"projected": True},
        "fingerprint": {layer: onto.fingerprint[layer] for layer in layers},
        "widths": {layer: onto.widths[layer] for layer in layers},
        "digest": "",
    }
    return ConceptMeta.model_validate(onto.model_dump() | changes)
