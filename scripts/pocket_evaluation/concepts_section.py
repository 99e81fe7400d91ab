"""What a concept gains over its bare class word, for every committed concept folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocket_evaluation.record import mean
from sbora_diffusion.alignment import Judges, difference
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.evaluate import (
    CLASS_WORD,
    CONCEPT,
    EvaluateConfig,
    Evaluation,
    evaluate_concept,
    evaluate_folder,
    read_pictures,
)
from sbora_diffusion.jobs import train_concept
from sbora_diffusion.library import Library
from sbora_diffusion.pictures import save_png
from sbora_diffusion.records import at_least, at_most

IMAGE_GAIN, TEXT_LOSS = 0.10, 0.05
MEANS = ("text_alignment", "image_alignment")
ORIGIN = ("base_key", "digest", "settings")  # what a folder of pictures remembers beside them
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class ConceptRun:
    """Where concept files and pictures are, and how pictures are drawn.

    Attributes:
        files: folder of the trained concepts; one that is there is not trained again.
        pictures: folder that keeps what was drawn.
        reuse: whether to score the pictures there in place of drawing.
    """

    files: Path
    judges: Judges
    config: EvaluateConfig
    pictures: Path | None = None
    reuse: bool = False

    def judge(
        self, base: Callable[[], Base], subject: Subject, slot: int, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """One concept's figures.

        Args:
            base: gives the base; not called where pictures are read.
        """
        name = subject.settings.name
        references = read_pictures(subject.images[0].parent)
        if self.reuse:
            return self._from_pictures(name, references)
        concept = self._concept(base(), subject, slot, say)
        found = evaluate_concept(base(), concept, references, self.judges, self.config)
        if self.pictures:
            self._keep(self.pictures / "concepts" / name, found)
        return {key: found.record[key] for key in (*ORIGIN, CONCEPT, CLASS_WORD, "difference")}

    def _concept(
        self, base: Base, subject: Subject, slot: int, say: Callable[[str], None]
    ) -> Concept:
        """The trained concept, in a slot of its own, so that the files can be merged."""
        name = subject.settings.name
        file = self.files / f"{name}.safetensors"
        if not file.exists():
            library = Library(self.files / f"{name}.sqlite3")  # processes share nothing
            result = train_concept(
                base, subject, TrainConfig(), library=library, output=file, slot=slot
            )
            say(f"{name}: trained in {result.seconds:.0f} s, loss {result.loss_last:.4f}")
        concept = read_concept(file)
        if concept.meta.training != TrainConfig().model_dump(mode="json"):
            raise SystemExit(f"{file} was not trained with the default settings: delete it")
        return concept

    def _keep(self, folder: Path, found: Evaluation) -> None:
        for name, group in found.groups.items():
            for k, (picture, text) in enumerate(zip(group.pictures, group.texts, strict=True)):
                save_png(picture, folder / name / f"{k:04}.png", {"prompt": text})
        origin = {key: found.record[key] for key in ORIGIN}
        (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")

    def _from_pictures(self, name: str, references: Sequence[Any]) -> dict[str, Any]:
        assert self.pictures
        folder, groups = self.pictures / "concepts" / name, {}
        for group in (CONCEPT, CLASS_WORD):
            record = evaluate_folder(folder / group, self.judges, references).record
            groups[group] = {"pictures": len(record["files"]), **{k: record[k] for k in MEANS}}
        origin = json.loads((folder / ORIGIN_FILE).read_text())
        return {**origin, **groups, "difference": difference(groups[CONCEPT], groups[CLASS_WORD])}


def concepts_figures(each: Mapping[str, dict[str, Any]], run: ConceptRun) -> dict[str, Any]:
    """The section: means over the concepts with their thresholds, then every concept."""
    gains = [found["difference"] for found in each.values()]
    features = list(gains[0]["image_alignment"])
    means = {
        group: {
            "text_alignment": mean([f[group]["text_alignment"] for f in each.values()]),
            "image_alignment": {
                name: mean([f[group]["image_alignment"][name] for f in each.values()])
                for name in features
            },
        }
        for group in (CONCEPT, CLASS_WORD)
    }
    change = mean([gain["text_alignment"] for gain in gains])
    return {
        "concepts": len(each),
        "judge": run.judges.clip.name,
        "training": TrainConfig().model_dump(mode="json"),
        "image_alignment_gain": {
            name: at_least(mean([g["image_alignment"][name] for g in gains]), IMAGE_GAIN)
            for name in features
        },
        "text_alignment_change": {**at_most(abs(change), TEXT_LOSS), "signed": change},
        "means": means,
        "each": dict(each),
    }
