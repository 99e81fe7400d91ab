"""Trainings of many concepts at once with what is tried against crosstalk beside the product's own.

Whitened factors: with C the second moment of a layer's inputs on generic prompts and ε a share of
its mean energy, the factor is Z S with S = (ε (C + ε)⁻¹)^½, and Z is trained. A step of the
optimizer then moves the factor little where generic inputs are loud: a soft form of keeping it in
their null space. FB's S is (in, in); FA has one of its own r columns.

Quiet columns: of an FA layer's inputs in the order of their generic energy, n concepts of rank r
share the first n · r, each every n-th of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from crosstalk_study.plan import Recipe, layer_group
from sbora_diffusion.core.concept import LayerFactor
from sbora_diffusion.core.mixed import Bank
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson


class Remedied(GroupTraining):
    """A group of concepts, trained by a recipe of the study.

    Args:
        generic: canonical name → second moment (in, in) on generic prompts; read where the recipe
            is white or quiet.
    """

    def __init__(
        self, base: Base, lessons: Sequence[Lesson], recipe: Recipe, generic: Mapping[str, Tensor]
    ):
        self._recipe, self._generic, self._steps_done = recipe, generic, 0
        for lesson in lessons:
            chosen = [
                n for n in lesson.layers if not recipe.layers or layer_group(n) in recipe.layers
            ]
            lesson.layers = {name: lesson.layers[name] for name in chosen}
            lesson.widths = {name: lesson.widths[name] for name in chosen}
        super().__init__(base, lessons)

    def _put_in(self) -> None:
        super()._put_in()
        self._free = {name: bank.factor for name, bank in self.banks.items()}
        self._white: dict[str, Tensor] = {}
        if self._recipe.white is not None:
            self._white = {
                name: whitening(bank, self._generic[name].to(bank.factor), self._recipe.white)
                for name, bank in self.banks.items()
            }

    def _bank(self, name: str, layer: nn.Linear) -> Bank:
        bank = super()._bank(name, layer)
        if not self._recipe.quiet:
            return bank
        return replace(bank, indices=quietest(self._generic[name].to(bank.scale), bank.indices))

    def _factors(self, component: str) -> list[nn.Parameter]:
        return [
            free
            for name, free in self._free.items()
            if name.startswith(component) and isinstance(free, nn.Parameter)
        ]

    def _losses(self, *args):
        self._compose()
        return super()._losses(*args)

    def _compose(self) -> None:
        """Make the factors from what is trained."""
        for name, white in self._white.items():
            object.__setattr__(self.banks[name], "factor", self._free[name] @ white)

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        self._steps_done += 1
        if self._steps_done <= self._recipe.alone:
            for free in self._free.values():
                if free.grad is not None:
                    free.grad.zero_()
        return super()._clip(parameters)

    @torch.no_grad()
    def _layers(self, entry: int, lesson: Lesson) -> dict[str, LayerFactor]:
        self._compose()
        return super()._layers(entry, lesson)


def quietest(moment: Tensor, indices: Tensor) -> Tensor:
    """(C, r): C · r inputs of the least energy in the place of an FA bank's own indices."""
    count, rank = indices.shape
    order = moment.diagonal().argsort(stable=True)[: count * rank]
    return order.view(rank, count).mT.sort(dim=1).values.contiguous()


def whitening(bank: Bank, moment: Tensor, share: float) -> Tensor:
    """S: (in, in) for FB, (C, r, r) for FA, whose entries read r inputs each."""
    moment = moment.double()
    epsilon = share * moment.diagonal().mean()
    if bank.variant == "fa":
        moment = moment[bank.indices[:, :, None], bank.indices[:, None, :]]
    energies, directions = torch.linalg.eigh(moment)
    scales = (epsilon / (energies.clamp_min(0) + epsilon)).sqrt()
    return ((directions * scales[..., None, :]) @ directions.mT).to(bank.factor.dtype)
