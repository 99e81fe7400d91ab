"""Trained files of the study, one a concept and method; what is there is not trained again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipe_study.plan import PLAIN

from pair_study.lora import Lora, LoraTraining, read_lora, write_lora
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.jobs import train_concept
from sbora_diffusion.library import Library

Say = Callable[[str], None]
TEXT_SHARE = 1 / 6
"""A LoRA's learning rate in the text encoder, of that in the UNet: as in SBoRA's recipe."""


@dataclass(frozen=True)
class Recipe:
    """How the concepts of one method are trained.

    Attributes:
        subjects: all of the study's, in the order of their slots.
    """

    method: str
    config: TrainConfig
    subjects: Sequence[Subject]

    def file(self, folder: Path, name: str) -> Path:
        return folder / self.method / f"{name}.safetensors"

    def read(self, folder: Path, name: str) -> Concept | Lora:
        """A trained file; another recipe's is refused."""
        file = self.file(folder, name)
        if not file.exists():
            raise SystemExit(f"{file} is missing: train it first")
        found = read_concept(file) if self.method == "sbora" else read_lora(file)
        if found.meta.training != self.config.model_dump(mode="json"):
            raise SystemExit(f"{file} was trained with other settings: delete it, or name them")
        return found

    def train(self, base: Base, name: str, folder: Path, say: Say) -> None:
        """Train and write one concept, unless its file is there."""
        file = self.file(folder, name)
        if file.exists():
            self.read(folder, name)
            return
        subject = {s.settings.name: s for s in self.subjects}[name]
        train = self._train_sbora if self.method == "sbora" else self._train_lora
        say(f"{self.method} {name}: {train(base, subject, file)}")

    def _train_sbora(self, base: Base, subject: Subject, file: Path) -> str:
        library = Library(file.with_suffix(".sqlite3"))  # processes share nothing
        file.parent.mkdir(parents=True, exist_ok=True)
        slot = self.subjects.index(subject)
        result = train_concept(base, subject, self.config, library=library, output=file, slot=slot)
        return f"{result.seconds:.0f} s, loss {result.loss_last:.4f}"

    def _train_lora(self, base: Base, subject: Subject, file: Path) -> str:
        lora, losses = trained_lora(base, subject, self.config)
        write_lora(file, lora)
        tenth = losses[-max(1, len(losses) // 10) :]
        return f"{lora.parameters} numbers, loss {sum(tenth) / len(tenth):.4f}"


def trained_lora(base: Base, subject: Subject, config: TrainConfig) -> tuple[Lora, list[float]]:
    """A LoRA of one subject, and the loss of every step."""
    training = LoraTraining(base, subject, config, start=0)
    try:
        losses = [record.loss for record in training.steps()]
        return training.lora(), losses
    finally:
        training.close()


def lora_config(
    rank: int, rate_unet: float, rate_text_encoder: float | None = None, steps: int | None = None
) -> TrainConfig:
    """SBoRA's plain recipe with a LoRA's own rank and learning rates."""
    rate_text_encoder = rate_unet * TEXT_SHARE if rate_text_encoder is None else rate_text_encoder
    rates = {"rate_unet": rate_unet, "rate_text_encoder": rate_text_encoder}
    config = TrainConfig(**{**PLAIN, **rates, "rank": rank})
    return config if steps is None else config.model_copy(update={"steps": steps})
