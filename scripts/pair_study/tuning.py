"""Which learning rate suits a LoRA: train, draw and score single concepts under several."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pair_study.lora import LoraPipeline
from pair_study.training import trained_lora
from sbora_diffusion.alignment import Judges, score
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import DrawConfig, TrainConfig
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, decode, draw_latents
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluate import PROMPTS, read_pictures


@dataclass(frozen=True)
class Bench:
    """What scores a trained concept: prompts of `sbora evaluate`, drawn all at once."""

    base: Base
    judges: Judges
    config: DrawConfig
    prompts: Sequence[str] = PROMPTS

    def lora(self, subject: Subject, config: TrainConfig) -> dict[str, Any]:
        """Train a LoRA and score it."""
        trained, _ = trained_lora(self.base, subject, config)
        pipeline = LoraPipeline(self.base)
        pipeline.switch([trained])
        try:
            return {"parameters": trained.parameters, **self._scored(subject)}
        finally:
            pipeline.switch([])

    def sbora(self, subject: Subject, concept: Concept) -> dict[str, Any]:
        """Score a trained concept on the same prompts and seeds."""
        pipeline = ConceptPipeline(self.base)
        pipeline.add(concept)
        try:
            factors = [layer.factor.numel() for layer in concept.layers.values()]
            return {"parameters": sum(factors), **self._scored(subject)}
        finally:
            pipeline.switch([])

    def _scored(self, subject: Subject) -> dict[str, Any]:
        token, bare = subject.settings.token, with_article(subject.settings.class_noun)
        prompts = [p for p in self.prompts for _ in range(self.config.num)]
        seeds = [self.config.seed + k for _ in self.prompts for k in range(self.config.num)]
        latents = draw_latents(
            self.base, [p.format(token) for p in prompts], seeds,
            self.config.steps, self.config.guidance,
        )  # fmt: skip
        references = self.judges.features(read_pictures(subject.images[0].parent))
        texts = [p.format(bare) for p in prompts]
        return score(self.judges, decode(self.base, latents), texts, references).means()


def label(config: TrainConfig) -> str:
    """What tells the settings apart that are compared."""
    return f"lora r{config.rank} unet {config.rate_unet:g} text {config.rate_text_encoder:.3g}"


def keep(out: Path, subject: str, kind: str, config: TrainConfig, found: Mapping[str, Any]) -> None:
    """Write one result; processes share a folder."""
    out.mkdir(parents=True, exist_ok=True)
    entry = {"concept": subject, "kind": kind, "training": config.model_dump(mode="json"), **found}
    file = out / f"{subject}-{kind.replace(' ', '_')}.json"
    file.write_text(json.dumps(entry, indent=1) + "\n")


def table(out: Path) -> list[dict[str, Any]]:
    """Means of each kind over the concepts that all kinds have, the best sum of both first."""
    entries = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    kinds = sorted({entry["kind"] for entry in entries})
    had = [{e["concept"] for e in entries if e["kind"] == kind} for kind in kinds]
    concepts = sorted(set.intersection(*had)) if had else []
    rows = [
        _row(kind, [e for e in entries if e["kind"] == kind and e["concept"] in concepts])
        for kind in kinds
        if concepts
    ]
    return sorted(rows, key=lambda row: -row["sum"])


def _row(kind: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = _mean(e["text_alignment"] for e in entries)
    features = list(entries[0]["image_alignment"])
    image = {name: _mean(e["image_alignment"][name] for e in entries) for name in features}
    first = features[0]  # the judge that also reads the texts
    return {
        "kind": kind,
        "concepts": [e["concept"] for e in entries],
        "parameters": entries[0]["parameters"],
        "text_alignment": text,
        "image_alignment": image,
        "sum": round(text + image[first], 4),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)
