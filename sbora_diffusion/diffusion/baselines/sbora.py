"""SBoRA as a method of the comparison: as the paper adds it up, as this project merges it, and with
indices that are not disjoint, as controls."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from sbora_diffusion.core.concept import Concept, read_concept, write_concept
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.diffusion.baselines.interface import InModel, Merge, Method, Trainable
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig

Weighted = tuple[Concept, float]
Indices = Literal["disjoint", "same", "random"]


def add_folded(base: Base, concepts: Sequence[Weighted], overlap: bool = False) -> InModel:
    """The paper's merge, W0 + Σ λ·scale·Δ; raises as `Merged.switch` does."""
    return InModel(Merged(base, concepts, overlap).restore)


def add_overlapping(base: Base, concepts: Sequence[Weighted]) -> InModel:
    """The same for concepts that may share indices."""
    return add_folded(base, concepts, overlap=True)


def calibrating(
    config: CalibrateConfig,
) -> Callable[[Base, Sequence[Weighted]], InModel]:
    """This project's merge, see `Calibrated`, which fits nothing where a concept is alone."""

    def into(base: Base, concepts: Sequence[Weighted]) -> InModel:
        if len(concepts) == 1:
            return add_folded(base, concepts)
        return InModel(Calibrated(base, concepts, config).restore)

    return into


class Sbora(Method[Concept]):
    """SBoRA.

    Args:
        indices: whose entries a concept has in each layer: those of its slot; those of slot 0,
            every concept; or random ones, drawn from its recipe's allocation seed and its name.
    """

    def __init__(
        self,
        name: str,
        title: str,
        config: TrainConfig,
        merges: Mapping[str, Merge[Concept]],
        indices: Indices = "disjoint",
    ):
        super().__init__(name, title, config, merges)
        self._indices = indices

    @property
    def variant(self) -> Variant:
        return self.config.variant

    def _lesson(self, base: Base, subject: Subject, slot: int, config: TrainConfig) -> Lesson:
        if self._indices == "disjoint":
            return super()._lesson(base, subject, slot, config)
        if self._indices == "random":
            seed = random_allocation(config.allocation_seed, subject.settings.name)
            config = config.model_copy(update={"allocation_seed": seed})
        return super()._lesson(base, subject, 0, config)

    def _open(self, base: Base, lessons: Sequence[Lesson]) -> GroupTraining:
        return GroupTraining(base, lessons)

    def _taken(self, training: GroupTraining) -> list[Concept]:
        return training.concepts()

    def alone(self, base: Base, concept: Concept) -> InModel:
        return add_folded(base, [(concept, 1.0)])

    def words(self, concept: Concept) -> str:
        return " ".join(entry.token for entry in concept.meta.tokens)

    def trainable(self, concept: Concept) -> Trainable:
        weights = sum(stored.factor.numel() for stored in concept.layers.values())
        return Trainable(weights, sum(rows.numel() for rows in concept.embeddings.values()))

    def write(self, path: Path, concept: Concept) -> None:
        write_concept(path, concept)

    def read(self, path: Path) -> Concept:
        concept = read_concept(path)
        if concept.meta.variant != self.variant:
            raise FormatError(
                f"{path} is SBoRA-{concept.meta.variant.upper()}, not {self.title}",
                "train it again",
            )
        return concept


def random_allocation(seed: int, name: str) -> int:
    """An allocation seed of a concept's own: the first indices of its permutations are random."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")
