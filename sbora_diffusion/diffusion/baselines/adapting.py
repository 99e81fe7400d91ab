"""Training concepts of other methods at once: rows of a batch have their concept's own update.

Loop, targets, captions and placeholders are SBoRA's (`group_training.py`); what is trained, and how
it acts, is each method's own.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.baselines.adapted import Adapted, AdaptedMeta, Form
from sbora_diffusion.diffusion.baselines.layerwise import (
    LayerwiseTokens,
    cross_attentions,
    layerwise_states,
)
from sbora_diffusion.diffusion.bases import DTYPES, Base
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.tokens import FIRST, TrainableTokens
from sbora_diffusion.diffusion.training_loop import TrainingLoop


class AdaptedTraining(GroupTraining):
    """A group of concepts in training; read them with `adapted()`.

    What the recipe says of variants is without meaning here.

    Args:
        method: the name that the concepts get.
        layerwise: whether placeholders have one vector for each cross-attention layer.
        random_first: if not 0, each placeholder's first vector, where it has several, starts at
            random, with this share of the standard deviation of the next one, the class noun's.

    Attributes:
        parts: canonical name of the layer → part → (concepts, …); parameters are trained.

    Raises:
        ConfigError: a recipe has another scale than 1; or as `GroupTraining`. Nothing was changed.
    """

    form: Form

    def __init__(
        self,
        base: Base,
        lessons: Sequence[Lesson],
        method: str,
        layerwise: bool = False,
        random_first: float = 0.0,
    ):
        if len(base.kind.encoders) > 1:
            raise ConfigError(
                f"a method compared with cannot work yet with a base of family {base.family}",
                "give a base with one text encoder",
            )
        _refuse_scale(lessons)
        self._method, self._layerwise, self._random_first = method, layerwise, random_first
        self._key, self._states = base.key, ExitStack()
        super().__init__(base, lessons)

    @abstractmethod
    def _start(self, name: str, layer: nn.Linear) -> Mapping[str, Tensor]:
        """The parts that a layer's updates start from; the base's output does not change."""

    @abstractmethod
    def _act(self, layer: nn.Linear, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """What the layer gives, (concepts, rows, out), for inputs x (concepts, rows, in), the base
        giving y."""

    def _trained_models(self) -> list[str]:
        """The text encoder too where its words stay: they may start elsewhere than the noun."""
        encoders = self.base.kind.present(self.base.pipeline)
        return [self.base.kind.denoiser, *(encoder.model for encoder in encoders)]

    def _adapted_layers(self) -> dict[str, nn.Linear]:
        return self.lessons[0].layers

    def _put_in(self) -> None:
        layers = self._adapted_layers()
        self.parts = {name: dict(self._start(name, layer)) for name, layer in layers.items()}

    def _placeholders(self, embedding: nn.Embedding, count: int) -> TrainableTokens:
        if not self._layerwise:
            tokens = super()._placeholders(embedding, count)
        else:
            attentions = len(cross_attentions(self.base.pipeline))
            tokens = LayerwiseTokens(embedding, count, attentions)
            self._states = layerwise_states(self.base.pipeline)
        if self._random_first:
            self._randomize(tokens)
        return tokens

    @torch.no_grad()
    def _randomize(self, tokens: TrainableTokens) -> None:
        """Each placeholder's first vector, the same for all layers where it has several."""
        for first, lesson in zip(self._firsts(), self.lessons, strict=True):
            generator = Generator().manual_seed(start_seed(lesson))
            noise = torch.randn(tokens.vectors.shape[-1], generator=generator)
            if len(lesson.initial[FIRST]) > 1:
                size = self._random_first * tokens.vectors[first + 1].std()
                tokens.vectors[first] = size * noise.to(tokens.vectors)

    def _firsts(self) -> list[int]:
        """The row of each concept's first vector."""
        owners = self._owners().tolist()
        return [owners.index(number) for number in range(len(self.lessons))]

    def _factors(self, component: str) -> list[nn.Parameter]:
        return [
            part
            for name, parts in self.parts.items()
            if name.startswith(component)
            for part in parts.values()
            if isinstance(part, nn.Parameter)
        ]

    def _train_mode(self, on: bool) -> None:
        TrainingLoop._train_mode(self, on)
        self._hooks.close()
        if on:
            for name, layer in self._adapted_layers().items():
                hook = partial(self._hook, self.parts[name])
                self._hooks.callback(layer.register_forward_hook(hook).remove)

    def _hook(
        self, parts: Mapping[str, Tensor], layer: nn.Module, inputs: tuple[Any, ...], y: Tensor
    ) -> Tensor:
        """Rows of one concept stand together in the batch."""
        x = inputs[0].reshape(len(self.lessons), -1, inputs[0].shape[-1])
        base = y.reshape(len(self.lessons), -1, y.shape[-1])
        return self._act(cast(nn.Linear, layer), parts, x, base).view(y.shape)

    def _take_out(self) -> None:
        super()._take_out()
        self._states.close()

    def adapted(self) -> list[Adapted]:
        """The concepts in the order of the lessons; can be read at any step."""
        owners = self._owners()
        return [
            self._one(number, lesson, self.trainable.vectors[owners == number])
            for number, lesson in enumerate(self.lessons)
        ]

    def _one(self, number: int, lesson: Lesson, vectors: Tensor) -> Adapted:
        settings, dtype = lesson.subject.settings, DTYPES[lesson.config.save_dtype]
        meta = AdaptedMeta(
            method=self._method,
            form=self.form,
            name=settings.name,
            class_noun=settings.class_noun,
            token=settings.token,
            base_key=self._key,
            training=lesson.config.model_dump(mode="json"),
        )
        layers = {
            name: {part: _copied(tensor[number], dtype) for part, tensor in parts.items()}
            for name, parts in self.parts.items()
        }
        return Adapted(meta, layers, _copied(vectors, dtype))


class WordTraining(AdaptedTraining):
    """Placeholders alone."""

    form: Form = "words"

    def _adapted_layers(self) -> dict[str, nn.Linear]:
        return {}

    def _start(self, name: str, layer: nn.Linear) -> Mapping[str, Tensor]:
        raise AssertionError("no layer is adapted")

    def _act(self, layer: nn.Linear, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("no layer is adapted")


def start_seed(lesson: Lesson) -> int:
    """Another one for each concept, whatever trains beside it."""
    digest = hashlib.sha256(f"{lesson.config.seed}/{lesson.start}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _refuse_scale(lessons: Sequence[Lesson]) -> None:
    for config in (lesson.config for lesson in lessons):
        if config.resolved_alpha != config.rank:
            raise ConfigError(
                f"alpha is {config.resolved_alpha:g} at rank {config.rank}: the methods compared "
                "with have the scale 1",
                "leave out alpha, or give it the rank's value",
            )


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
