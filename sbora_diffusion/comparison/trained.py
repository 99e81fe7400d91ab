"""Trained concepts, kept as files so that an interrupted comparison trains none of them twice."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sbora_diffusion.comparison.lines import difference, read_today
from sbora_diffusion.core.errors import ConflictError, FormatError
from sbora_diffusion.core.storage import write_atomically
from sbora_diffusion.diffusion.baselines.interface import Method
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.training_loop import StepRecord
from sbora_diffusion.outputs import make_parent

T = TypeVar("T")
OnStep = Callable[[Sequence[str], StepRecord], None]


@dataclass(frozen=True)
class Trained(Generic[T]):
    """A concept and what its training took.

    Attributes:
        seconds: of the whole batch that it was trained in.
        beside: concepts in that batch, itself included.
    """

    concept: T
    seconds: float
    beside: int

    def record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "concepts_at_once": self.beside}


def train_all(
    method: Method[T],
    base: Base,
    subjects: Mapping[str, Subject],
    slots: Mapping[str, int],
    config: TrainConfig,
    at_once: int,
    on_step: OnStep | None = None,
) -> dict[str, Trained[T]]:
    """Name → a concept of each subject; raises as `Method.train` does."""
    found: dict[str, Trained[T]] = {}
    names = list(subjects)
    for start in range(0, len(names), at_once):
        group = names[start : start + at_once]
        began = time.monotonic()
        concepts = method.train(
            base, [subjects[n] for n in group], config,
            slots=[slots[n] for n in group], at_once=at_once, on_step=on_step,
        )  # fmt: skip
        seconds = round(time.monotonic() - began, 2)
        for name, concept in zip(group, concepts, strict=True):
            found[name] = Trained(concept, seconds, len(group))
    return found


class Files:
    """The files of one entry of a preset and one seed.

    Args:
        folder: theirs alone.
        base: that the concepts belong to.
        config: that they are trained by.
    """

    def __init__(self, folder: Path, method: Method[Any], base: Base, config: TrainConfig):
        self.folder, self.method, self.base = folder, method, base
        self._made_by = {"base": base.key, "config": config.model_dump(mode="json")}

    def get(self, name: str) -> Trained[Any] | None:
        """A concept that was kept, if it was.

        Raises:
            ConflictError: it was trained on another base, or by another recipe.
            FormatError, IntegrityError, NonFiniteError, ResourceError: it cannot be read.
        """
        note = self.folder / f"{name}.json"  # written last: without it the concept is not whole
        if not note.exists():
            return None
        try:
            made = json.loads(note.read_text(encoding="utf-8"))
            made_by = read_today({key: made[key] for key in self._made_by})
            took = made["seconds"], made["beside"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{note} is damaged", f"delete {self.folder}") from error
        if made_by != self._made_by:
            raise ConflictError(
                f"{self.folder / name} was trained otherwise: {difference(made_by, self._made_by)}",
                "give another --files, or delete that folder",
            )
        return Trained(self.method.read(self._file(name)), *took)

    def put(self, name: str, trained: Trained[Any]) -> None:
        """Keep a concept; raises ResourceError."""
        make_parent(self._file(name))
        self.method.write(self._file(name), trained.concept)
        note = {**self._made_by, "seconds": trained.seconds, "beside": trained.beside}
        write_atomically(self.folder / f"{name}.json", json.dumps(note).encode())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
