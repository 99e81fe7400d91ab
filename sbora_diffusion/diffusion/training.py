"""Training one concept: a generator of step records around a stock pipeline."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.recalled import plain_norms, recalled_norms
from sbora_diffusion.core.tuner.folded_training import folded_training
from sbora_diffusion.diffusion.adapters import adapter_name, eject, inject, trained_layers
from sbora_diffusion.diffusion.bases import DTYPES, Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.targets import adaptable
from sbora_diffusion.diffusion.training_loop import StepRecord, TrainingLoop


class ConceptTraining(TrainingLoop):
    """One concept in training. Use `steps()` to the end, then `concept()`, then `close()`.

    While it is open the base carries the adapter, so pictures can be drawn from `base.pipeline`.
    A subclass may bring another adapter: training knows it by `_put_in`, `_factors` and `_take_out`
    alone.

    Args:
        base: an unadapted base; `close()` gives it back as it was.
        subject: settings and reference images.
        config: the recipe.
        start: first entry of the concept's range, e.g. slot · rank.

    Raises:
        CapacityError, ConflictError, DataError, ConfigError: before anything is changed.
    """

    def __init__(self, base: Base, subject: Subject, config: TrainConfig, start: int):
        self.lesson = Lesson(base, subject, config, start)
        self.subject, self.start, self.layers = subject, start, self.lesson.layers
        models = [model for _, model in adaptable(base.pipeline)]
        recalls = config.variant == "fb" and not base.runtime.compiled
        self._norms = [norm for model in models for norm in plain_norms(model)] if recalls else []
        self._hooks = ExitStack()
        super().__init__(base, [self.lesson])

    def _put_in(self) -> None:
        config = self.config
        self.adapted = inject(
            self.base.pipeline, self.subject.settings.name, list(self.layers), config.variant,
            config.rank, config.resolved_alpha, self.start, config.allocation_seed, config.dropout,
        )  # fmt: skip

    def _factors(self, component: str) -> list[nn.Parameter]:
        name = adapter_name(self.subject.settings.name)
        return [
            layer.sbora_factor[name]
            for path, layer in self.adapted.items()
            if path.startswith(component)
        ]

    def _take_out(self) -> None:
        eject(self.base.pipeline, self.subject.settings.name)

    def _train_mode(self, on: bool) -> None:
        super()._train_mode(on)
        self._hooks.close()  # pictures between the steps are recorded only without hooks
        if on:
            self._hooks.enter_context(recalled_norms(self._norms))

    def _after_step(self) -> None:
        self.folded.write_back()

    def steps(self) -> Iterator[StepRecord]:
        """Train; one record after each optimizer step.

        Where nothing stands in the way (`self.folded.obstacles` says what), the trained columns or
        rows live in the base's weights until the steps end, however they end.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        with folded_training(self.adapted, adapter_name(self.subject.settings.name)) as self.folded:
            yield from super().steps()

    def concept(self) -> Concept:
        """The trained concept, on the CPU; it can be read at any step."""
        dtype = DTYPES[self.config.save_dtype]
        layers = trained_layers(self.adapted, self.subject.settings.name, dtype)
        vectors = {encoder: tokens.vectors for encoder, tokens in self.trainables.items()}
        return self.lesson.concept(layers, vectors)

    def token_vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The placeholder's vectors (vectors, dim) as they are now, copied to the CPU."""
        return self.trainable.vectors.detach().to("cpu", dtype, copy=True)
