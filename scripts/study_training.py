"""All subjects of a study trained in one batch."""

from collections.abc import Sequence

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson


def lessons_of(base: Base, subjects: Sequence[Subject], config: TrainConfig) -> list[Lesson]:
    """One for each subject, in slots of their own."""
    return [Lesson(base, s, config, slot * config.rank) for slot, s in enumerate(subjects)]


def finished(training: GroupTraining) -> list[Concept]:
    """A training's concepts after its last step; it is closed then."""
    try:
        for _ in training.steps():
            pass
        return training.concepts()
    finally:
        training.close()


def train(base: Base, subjects: Sequence[Subject], config: TrainConfig) -> list[Concept]:
    """A concept of each subject."""
    return finished(GroupTraining(base, lessons_of(base, subjects, config)))
