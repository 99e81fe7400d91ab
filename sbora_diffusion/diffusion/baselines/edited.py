"""A base whose attention weights and placeholders are replaced, and put back bit for bit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sbora_diffusion.core.errors import (
    BaseMismatch,
    ConflictError,
    FormatError,
    NonFiniteError,
)
from sbora_diffusion.core.folded_set import refuse_bad_weight
from sbora_diffusion.diffusion.baselines.adapted import Adapted, update_of
from sbora_diffusion.diffusion.baselines.interface import InModel
from sbora_diffusion.diffusion.baselines.layerwise import Vocabulary
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.targets import target_layers

Weighted = tuple[Adapted, float]
"""A concept and its λ."""


class EditedBase:
    """A base's attention weights, which are written as wholes.

    Args:
        base: nothing is folded into it; `restore` gives it back bit for bit.

    Attributes:
        own: canonical name → the base's own weight, copied.

    Raises:
        ConflictError: something is folded into the base.
    """

    def __init__(self, base: Base):
        if base.folded:
            raise ConflictError("the base has concepts folded into it", "restore it first")
        self.base, self.key = base, base.key
        self.layers = target_layers(base.pipeline)
        self.own = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._vocabulary = Vocabulary(base.pipeline)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Make these the weights, each rounded once; the other layers have their own again.

        Raises:
            NonFiniteError: one would not be finite; nothing is changed.
        """
        rounded = {name: weights[name].to(self.own[name]) for name in weights}
        for name, weight in rounded.items():
            if not weight.isfinite().all():
                raise NonFiniteError(f"{name}: a merged weight is not finite", "lower the weights")
        for name, layer in self.layers.items():
            layer.weight.copy_(rounded.get(name, self.own[name]))
        self.base.folded = True

    def say(self, concepts: Sequence[Adapted]) -> None:
        """Make theirs the placeholders.

        Raises:
            ConflictError, FormatError: see `Vocabulary.set`; nothing is changed.
        """
        self._vocabulary.set({c.meta.token: c.vectors for c in concepts if len(c.vectors)})
        self.base.folded = True

    def restore(self) -> None:
        """Put the base's own bytes and vocabulary back."""
        self._vocabulary.set({})
        self.write({})
        self.base.folded = False

    def check(self, concepts: Sequence[Weighted]) -> None:
        """Raise BaseMismatch, ConfigError, ConflictError or FormatError if these cannot be merged
        here."""
        for concept, weight in concepts:
            refuse_bad_weight(weight)
            self._refuse_misfit(concept)
        for what in ("name", "token"):
            values = [getattr(concept.meta, what) for concept, _ in concepts]
            if twice := {value for value in values if values.count(value) > 1}:
                raise ConflictError(f"two concepts have the {what} {min(twice)!r}", "rename one")

    def _refuse_misfit(self, concept: Adapted) -> None:
        meta = concept.meta
        if meta.base_key != self.key:
            raise BaseMismatch(
                f"{meta.name!r} was trained on the base {meta.base_key}, this is {self.key}",
                "load the base that it was trained on",
            )
        for name, parts in concept.layers.items():
            shape = _shape(parts)
            if name not in self.own or shape != list(self.own[name].shape):
                raise FormatError(
                    f"{meta.name!r}: the base has no layer {name} of {shape}", "give its own base"
                )


class Summed(EditedBase):
    """A base with concepts added to its weights, W0 + Σ λ ΔW in fp32."""

    def switch(self, concepts: Sequence[Weighted]) -> None:
        """Make exactly these concepts the ones in the model.

        Raises:
            BaseMismatch, ConfigError, ConflictError, FormatError, NonFiniteError: they cannot be
                added; the base is itself then.
        """
        self.check(concepts)
        if not concepts:
            return self.restore()
        try:
            self.say([concept for concept, _ in concepts])
            self.write(summed(concepts, self.own))
        except BaseException:
            self.restore()
            raise


@torch.no_grad()
def summed(
    concepts: Sequence[Weighted], own: Mapping[str, Tensor], layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """W0 + Σ λ ΔW, fp32, of the layers that a concept adapts.

    Args:
        own: canonical name → W0.
        layers: those that are wanted; all by default.
    """
    found: dict[str, Tensor] = {}
    for concept, weight in concepts:
        for name, parts in concept.layers.items():
            if layers is None or name in layers:
                before = found.get(name, own[name].float())
                found[name] = before + weight * update_of(parts, own[name])
    return found


def add_up(base: Base, concepts: Sequence[Weighted]) -> InModel:
    """Concepts added to a base; raises as `Summed.switch` does."""
    model = Summed(base)
    model.switch(concepts)
    return InModel(model.restore)


def _shape(parts: Mapping[str, Tensor]) -> list[int]:
    if "delta" in parts:
        return list(parts["delta"].shape)
    return [len(parts["up"]), parts["down"].shape[1]]
