"""Methods whose concepts are `Adapted`: how they train, and the merges that need no fitting."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.diffusion.baselines.adapted import (
    Adapted,
    AdaptedMeta,
    read_adapted,
    write_adapted,
)
from sbora_diffusion.diffusion.baselines.adapting import AdaptedTraining
from sbora_diffusion.diffusion.baselines.edited import add_up
from sbora_diffusion.diffusion.baselines.interface import InModel, Merge, Method, Trainable
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import ConceptSettings, Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.tokens import FIRST, word_vectors

Opened = Callable[[Base, Sequence[Lesson], str], AdaptedTraining]
"""Base, lessons and the method's name → a training."""

SUM = Merge[Adapted]("sum", add_up)
MEAN = Merge[Adapted]("1/n", add_up, weight=None)
SUM_06 = Merge[Adapted]("sum, λ = 0.6", add_up, weight=0.6)


class AdaptedMethod(Method[Adapted]):
    """A method that trains parts of updates, and a placeholder.

    Args:
        opened: makes its training.
        frozen: the parts that are not trained.
        modifier: whether its placeholder is one word before the class noun, which is kept.
        by_slot: whether a concept's range of rank numbers must be its own and inside each layer's
            width. Otherwise a slot takes one number, so that ranks set no limit.
    """

    def __init__(
        self,
        name: str,
        title: str,
        config: TrainConfig,
        merges: Mapping[str, Merge[Adapted]],
        opened: Opened,
        frozen: Sequence[str] = (),
        by_slot: bool = False,
        modifier: bool = False,
    ):
        super().__init__(name, title, config, merges)
        self._opened, self._frozen = opened, frozenset(frozen)
        self._by_slot, self._modifier = by_slot, modifier

    def _lesson(self, base: Base, subject: Subject, slot: int, config: TrainConfig) -> Lesson:
        start = slot * config.rank if self._by_slot else slot
        lesson = Lesson(base, subject, config, start)
        noun = word_vectors(base.pipeline, subject.settings.class_noun)
        if self._modifier:
            lesson.initial[FIRST] = torch.cat([noun[-1:], noun])
        elif len(lesson.initial[FIRST]) < len(noun):  # of a compound, what it is stands last
            lesson.initial[FIRST] = noun[-len(lesson.initial[FIRST]) :]
        return lesson

    def _open(self, base: Base, lessons: Sequence[Lesson]) -> GroupTraining:
        return self._opened(base, lessons, self.name)

    def _taken(self, training: GroupTraining) -> list[Adapted]:
        assert isinstance(training, AdaptedTraining)
        return training.adapted()

    def alone(self, base: Base, concept: Adapted) -> InModel:
        return add_up(base, [(concept, 1.0)])

    def words(self, concept: Adapted) -> str:
        return concept.meta.token

    def trainable(self, concept: Adapted) -> Trainable:
        weights = sum(
            tensor.numel()
            for parts in concept.layers.values()
            for part, tensor in parts.items()
            if part not in self._frozen
        )
        trained = concept.vectors[:1] if self._modifier else concept.vectors
        return Trainable(weights, trained.numel())

    def write(self, path: Path, concept: Adapted) -> None:
        write_adapted(path, concept)

    def read(self, path: Path) -> Adapted:
        return read_adapted(path, self.name)


class ClassWord(AdaptedMethod):
    """The bare class noun: nothing is trained. Its text alignment is an upper bound of what a
    method that keeps the class can reach, its image alignment a lower one."""

    def train(
        self,
        base: Base,
        subjects: Sequence[Subject],
        config: TrainConfig | None = None,
        **_others: Any,
    ) -> list[Adapted]:
        """What stands for each subject; nothing of `Method.train`'s other arguments matters."""
        key = base.key
        return [self._bare(subject.settings, key) for subject in subjects]

    def _bare(self, settings: ConceptSettings, key: str) -> Adapted:
        meta = AdaptedMeta(
            method=self.name,
            form="words",
            name=settings.name,
            class_noun=settings.class_noun,
            token=settings.token,
            base_key=key,
            training={},
        )
        return Adapted(meta, {}, torch.zeros(0, 1))

    def words(self, concept: Adapted) -> str:
        return concept.meta.class_noun
