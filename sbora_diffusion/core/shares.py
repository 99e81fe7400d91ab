"""One concept of a folded set: its updates, and where it stands on a device."""

from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sbora_diffusion.core.concept import Concept, refuse_extras
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.updates import Update, check_updates


@dataclass(frozen=True, eq=False)
class Share:
    """A concept with its weight λ."""

    concept: Concept
    weight: float

    @property
    def digest(self) -> str:
        return self.concept.meta.digest

    @property
    def rank(self) -> int:
        return self.concept.meta.rank

    @property
    def dim(self) -> int:
        """The dimension of W0 (out, in) that its indices count."""
        return 1 if self.concept.meta.variant == "fa" else 0

    @property
    def scale(self) -> float:
        """λ · alpha / rank."""
        return scaling(self.concept.meta.alpha, self.concept.meta.rank, self.weight)

    @cached_property
    def updates(self) -> dict[str, Update]:
        """Layer to update."""
        return concept_updates(self.concept, self.weight)

    @cached_property
    def footprint(self) -> "Footprint":
        """What is found out once about the concept, whatever its weight."""
        concept = self.concept
        if concept not in _FOOTPRINTS:
            _FOOTPRINTS[concept] = Footprint(_is_even(concept), frozenset(concept.layers))
        return _FOOTPRINTS[concept]

    def fits(self, layers: tuple[str, ...], weight: Tensor) -> bool:
        """Do factors and indices fit layers with weights like this one? Looked at once."""
        fitting, kind = self.footprint.fitting, (layers, weight.shape, weight.dtype)
        if kind not in fitting:
            try:
                for layer in layers:
                    check_updates(weight, [self.updates[layer]])
            except FormatError:
                return False
            fitting.add(kind)
        return True

    def places(self, layers: tuple[str, ...], device: torch.device) -> Tensor:
        """The indices in these layers as int64 (layers, r); they stay there as long as the
        concept."""
        known = self.footprint.places
        if (layers, device) not in known:
            indices = [self.concept.layers[layer].indices for layer in layers]
            known[layers, device] = torch.stack(indices).to(device, torch.int64)
        return known[layers, device]


@dataclass(frozen=True, eq=False)
class Footprint:
    """What a concept needs in any set.

    Attributes:
        even: are all factors of one type, on one device and of the concept's rank?
        layers: those that it adapts.
        fitting: layers, and shape and type of weights that its updates are known to fit.
        places: layers and device to indices.
    """

    even: bool
    layers: frozenset[str]
    fitting: set[tuple[tuple[str, ...], torch.Size, torch.dtype]] = field(default_factory=set)
    places: dict[tuple[tuple[str, ...], torch.device], Tensor] = field(default_factory=dict)


_FOOTPRINTS: WeakKeyDictionary[Concept, Footprint] = WeakKeyDictionary()


def _is_even(concept: Concept) -> bool:
    stored = concept.layers.values()
    kinds = {(one.factor.dtype, one.factor.device, one.indices.numel()) for one in stored}
    return {rank for *_, rank in kinds} == {concept.meta.rank} and len(kinds) == 1


def concept_updates(concept: Concept, weight: float) -> dict[str, Update]:
    """A concept's share of each of its layers, with scale λ·alpha/rank.

    Raises:
        FormatError: it stores more than updates of weights.
    """
    refuse_extras(concept)
    meta = concept.meta
    scale = scaling(meta.alpha, meta.rank, weight)
    return {
        layer: Update(meta.digest, meta.variant, stored.indices, stored.factor, scale)
        for layer, stored in concept.layers.items()
    }
