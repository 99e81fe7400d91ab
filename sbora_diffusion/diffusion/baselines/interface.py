"""What every method can do: train concepts of many subjects, put them in one model, keep files."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining, shared_settings
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.training_loop import StepRecord

T = TypeVar("T")
AT_ONCE = 16
"""Subjects in one training's batch."""


class InModel:
    """Concepts that are in a base now. `restore()`, or the end of a `with`, gives the base back bit
    for bit; until then nothing else may change its weights or tokens.

    Args:
        restore: takes them out; may be called again.
    """

    def __init__(self, restore: Callable[[], None]):
        self.restore = restore

    def __enter__(self) -> "InModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.restore()


@dataclass(frozen=True)
class Merge(Generic[T]):
    """One way of putting several concepts in one model.

    Attributes:
        title: for people.
        into: base and concepts with their weights λ → the handle.
        weight: λ of each; None for one over their number.
    """

    title: str
    into: Callable[[Base, Sequence[tuple[T, float]]], InModel]
    weight: float | None = 1.0


@dataclass(frozen=True)
class Trainable:
    """How many numbers were trained for a concept, frozen factors and indices not counted."""

    weights: int
    tokens: int


class Method(ABC, Generic[T]):
    """A method of the comparison; T is its trained concept.

    Args:
        name: its key; also in its files.
        title: for people.
        config: the recipe that it is trained by where the caller gives none.
        merges: name → way of merging; the first is the method's own.
    """

    def __init__(self, name: str, title: str, config: TrainConfig, merges: Mapping[str, Merge[T]]):
        self.name, self.title, self.config, self.merges = name, title, config, merges

    def train(
        self,
        base: Base,
        subjects: Sequence[Subject],
        config: TrainConfig | None = None,
        *,
        slots: Sequence[int] | None = None,
        at_once: int = AT_ONCE,
        on_step: Callable[[Sequence[str], StepRecord], None] | None = None,
    ) -> list[T]:
        """A concept of each subject; each learns, up to rounding, what it would learn alone.

        Args:
            base: unadapted; left as it was.
            config: the recipe, seed included; the method's own by default.
            slots: of the subjects, 0, 1, 2 … by default: what must differ between concepts, such as
                their indices, follows from the slot.
            at_once: subjects in one batch; recipes that cannot be shared train one by one.
            on_step: called with the names of those in training and what happened in a step.

        Raises:
            CapacityError, ConfigError, ConflictError, DataError: before a step is made.
            NonFiniteError: a loss became NaN or infinite.
        """
        config = self.config if config is None else config
        slots = range(len(subjects)) if slots is None else slots
        if len(slots) != len(subjects):
            raise ConfigError(
                f"{len(slots)} slots for {len(subjects)} subjects", "give one for each"
            )
        size = at_once if shared_settings(config) is not None else 1
        pairs = list(zip(subjects, slots, strict=True))
        trained: list[T] = []
        for first in range(0, len(pairs), size):
            group = pairs[first : first + size]
            trained += self._train_group(
                base, [self._lesson(base, *p, config) for p in group], on_step
            )
        return trained

    def _train_group(
        self,
        base: Base,
        lessons: Sequence[Lesson],
        on_step: Callable[[Sequence[str], StepRecord], None] | None,
    ) -> list[T]:
        names = [lesson.subject.settings.name for lesson in lessons]
        training = self._open(base, lessons)
        try:
            for record in training.steps():
                if on_step:
                    on_step(names, record)
            return self._taken(training)
        finally:
            training.close()
            if base.device.type == "cuda":
                gc.collect()  # a recorded step keeps its memory till then
                torch.cuda.empty_cache()

    def _lesson(self, base: Base, subject: Subject, slot: int, config: TrainConfig) -> Lesson:
        return Lesson(base, subject, config, slot * config.rank)

    @abstractmethod
    def _open(self, base: Base, lessons: Sequence[Lesson]) -> GroupTraining:
        """A training of these."""

    @abstractmethod
    def _taken(self, training: GroupTraining) -> list[T]:
        """What it has trained, in the order of the lessons."""

    @abstractmethod
    def alone(self, base: Base, concept: T) -> InModel:
        """Put a concept in a model as it was trained; raises as `merged` does."""

    def merged(
        self, base: Base, concepts: Sequence[T], how: str | None = None, weight: float | None = None
    ) -> InModel:
        """Put concepts in one model.

        Args:
            base: nothing may be folded into it.
            how: one of `merges`, the method's own by default.
            weight: λ of each; what that way says by default.

        Raises:
            ConfigError: no such way, or no concepts.
            BaseMismatch, ConflictError, FormatError, NonFiniteError: they cannot be merged; the
                base is as it was.
        """
        merge = self._merge(how)
        if not concepts:
            raise ConfigError(f"{self.title}: no concepts to merge", "name at least one")
        if weight is None:
            weight = 1 / len(concepts) if merge.weight is None else merge.weight
        return merge.into(base, [(concept, weight) for concept in concepts])

    def _merge(self, how: str | None) -> Merge[T]:
        if how is None:
            return next(iter(self.merges.values()))
        if how not in self.merges:
            raise ConfigError(
                f"{self.title} cannot be merged by {how!r}", f"it knows {', '.join(self.merges)}"
            )
        return self.merges[how]

    @abstractmethod
    def words(self, concept: T) -> str:
        """What stands for the subject in a prompt, without an article."""

    @abstractmethod
    def trainable(self, concept: T) -> Trainable:
        """What was trained for it."""

    @abstractmethod
    def write(self, path: Path, concept: T) -> None:
        """Write a concept's file; raises ResourceError."""

    @abstractmethod
    def read(self, path: Path) -> T:
        """Read what `write` wrote; raises FormatError, IntegrityError, NonFiniteError,
        ResourceError."""
