"""Training several concepts at once: one pass and one optimizer step for all of them.

Each concept draws the batches that it would draw alone, its rows stand together in the batch, and
nothing is shared but the frozen model: each row has its concept's factors, the loss is the sum of
the concepts' own, gradients are clipped concept by concept, and AdamW works entry by entry. So each
learns, up to rounding, what it would learn alone.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.core.allocation import indices_for
from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.mixed import Bank, stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.core.updates import Update
from sbora_diffusion.diffusion.bases import DTYPES, Base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.prompts import tokens_in
from sbora_diffusion.diffusion.tokens import FIRST
from sbora_diffusion.diffusion.training_loop import TrainingLoop

_OWN = {
    "rank", "alpha", "allocation_seed", "vectors", "copies", "flip", "prior_images", "seed",
    "save_dtype",
}  # fmt: skip


def shared_settings(config: TrainConfig) -> tuple[Any, ...] | None:
    """What concepts must agree in to train together; None if this recipe trains alone.

    Dropout draws one mask for the whole batch, and fp16's loss scale follows all its gradients:
    with either, a concept would depend on the others. With aspect buckets their pictures have other
    sizes in the same step.
    """
    if config.dropout > 0.0 or config.mixed_precision == "fp16" or config.aspect_buckets:
        return None
    return tuple(sorted(config.model_dump(mode="json", exclude=_OWN).items()))


class GroupTraining(TrainingLoop):
    """Several concepts in training. Use `steps()` to the end, then `concepts()`, then `close()`.

    Ranks may differ. Ranges may overlap: the concepts do not meet. Pictures drawn while it is open
    are the bare base's.

    Args:
        base: an unadapted base; `close()` gives it back as it was.
        lessons: at least one; `shared_settings` of their recipes are equal.

    Raises:
        ConflictError: two have one name or token, or one's caption has another's token.
        ConfigError: the recipes cannot be shared.
        Nothing was changed.
    """

    def __init__(self, base: Base, lessons: Sequence[Lesson]):
        _refuse_unshared(lessons)
        self._hooks = ExitStack()
        super().__init__(base, lessons)

    def _put_in(self) -> None:
        layers = self.lessons[0].layers
        self.banks = {name: self._bank(name, layer) for name, layer in layers.items()}

    def _bank(self, name: str, layer: nn.Linear) -> Bank:
        """Zero factors with each concept's own indices."""
        shape = (layer.out_features, layer.in_features)
        entries = [[_zero_update(lesson, name, shape)] for lesson in self.lessons]
        bank = stacked(self.config.variant, entries, shape, layer.weight)
        return Bank(bank.variant, nn.Parameter(bank.factor), bank.indices, bank.scale)

    def _factors(self, component: str) -> list[nn.Parameter]:
        banks = self.banks.items()
        return [
            bank.factor
            for name, bank in banks
            if name.startswith(component) and isinstance(bank.factor, nn.Parameter)
        ]

    def _take_out(self) -> None:
        self._hooks.close()

    def _train_mode(self, on: bool) -> None:
        super()._train_mode(on)
        self._hooks.close()  # pictures between the steps have other batches
        if on:
            layers = self.lessons[0].layers
            banks = {name: [bank] for name, bank in self.banks.items()}
            self._hooks.enter_context(mixed_rows(layers, banks))

    @torch.no_grad()
    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Limit the norm of each concept's own gradient, as `clip_grad_norm_` does for one; the
        norms before, (lessons,)."""
        owners = {
            tokens.vectors: nn.functional.one_hot(self._owners(encoder), len(self.lessons))
            for encoder, tokens in self.trainables.items()
        }
        squares = torch.zeros(len(self.lessons), device=self.base.device)
        graded = [(p.grad, owners.get(p)) for p in parameters if p.grad is not None]
        for grad, rows in graded:
            own = grad.float().flatten(1).square().sum(1)
            squares += own if rows is None else rows.to(own).T @ own
        norms = squares.sqrt()
        share = (self.config.max_gradient_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad, rows in graded:
            factor = share if rows is None else rows.to(share) @ share
            grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)))
        return norms

    def _owners(self, encoder: str = FIRST) -> Tensor:
        """(vectors,): whose placeholder each trained vector belongs to; see `PlaceholderTokens`."""
        tokens = [lesson.subject.settings.token for lesson in self.lessons]
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        counts = torch.tensor([len(self.lessons[k].initial[encoder]) for k in order])
        return torch.tensor(order).repeat_interleave(counts).to(self.base.device)

    def concepts(self) -> list[Concept]:
        """The concepts in the order of the lessons, on the CPU; can be read at any step."""
        return [
            lesson.concept(self._layers(k, lesson), self._vectors(k))
            for k, lesson in enumerate(self.lessons)
        ]

    def _vectors(self, entry: int) -> dict[str, Tensor]:
        """Text encoder → the vectors of one concept's placeholder."""
        return {
            encoder: tokens.vectors[self._owners(encoder) == entry]
            for encoder, tokens in self.trainables.items()
        }

    def _layers(self, entry: int, lesson: Lesson) -> dict[str, LayerFactor]:
        config = lesson.config
        rank, dtype = config.rank, DTYPES[config.save_dtype]
        layers = {}
        for name, bank in self.banks.items():
            indices = bank.indices[entry, :rank].to("cpu", torch.int32, copy=True)
            own = bank.factor[entry].detach().narrow(_dim(config), 0, rank)
            layers[name] = LayerFactor(indices, own.contiguous().to("cpu", dtype, copy=True))
        return layers


def _zero_update(lesson: Lesson, layer: str, shape: tuple[int, int]) -> Update:
    config, start = lesson.config, lesson.start
    form, stop = list(shape), start + config.rank
    form[_dim(config)] = config.rank
    indices = indices_for(layer, shape[_dim(config)], start, stop, config.allocation_seed)
    scale = scaling(config.resolved_alpha, config.rank)
    return Update(lesson.subject.settings.name, config.variant, indices, torch.zeros(form), scale)


def _dim(config: TrainConfig) -> int:
    """The dimension of a weight that the indices count, and of a factor that the rank is."""
    return 1 if config.variant == "fa" else 0


def _refuse_unshared(lessons: Sequence[Lesson]) -> None:
    shared = {shared_settings(lesson.config) for lesson in lessons}
    if len(shared) != 1 or None in shared:
        raise ConfigError(
            "these recipes cannot train at once: they differ in more than rank and data, or have "
            "dropout, fp16 or aspect buckets",
            "train them one after another, --at-once 1",
        )
    settings = [lesson.subject.settings for lesson in lessons]
    for what in ("name", "token"):
        values = [getattr(s, what) for s in settings]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ConflictError(f"two subjects have the {what} {min(twice)!r}", "rename one")
    for one, other in permutations(lessons, 2):
        _refuse_meeting_captions(one, other)


def _refuse_meeting_captions(one: Lesson, other: Lesson) -> None:
    token = other.subject.settings.token
    captions = {caption for example in one.examples for caption in example.captions}
    if any(token in tokens_in(caption) for caption in captions):
        raise ConflictError(
            f"a caption of {one.subject.settings.name!r} has {token}, which is "
            f"{other.subject.settings.name!r}",
            "train them one after another, --at-once 1",
        )
