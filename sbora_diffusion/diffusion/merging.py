"""Concepts folded into one model that stock diffusers loads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.core.compatibility import overlaps
from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import ConflictError
from sbora_diffusion.core.fingerprint import Fingerprint, compare
from sbora_diffusion.core.folded_set import FoldedSet, Weighted
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.model_card import card
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, text_encoders

RECORD = "sbora.json"


class Merged:
    """Concepts folded in place; without concepts the base is itself, bit for bit.

    Every owned entry becomes cast(fp32(W0) + Σ λ·scale·Δ), summed in the order of the concepts'
    digests, so a model depends neither on the order in which concepts are given nor on what was
    folded before. While concepts are in, nothing else may change the base's weights or tokens.

    Args:
        base: unfolded and without adapters.
        concepts: concepts with their weights λ.
        allow_overlap: accept concepts of one variant that share indices.

    Raises:
        As `switch` does.
    """

    def __init__(
        self, base: Base, concepts: Sequence[Weighted] = (), allow_overlap: bool = False
    ) -> None:
        self.base, self.allow_overlap = base, allow_overlap
        self._relations: dict[str, str] = {}  # digest → "same" or "rounded"
        self.tokens = PlaceholderTokens(base.pipeline)
        self._folded = FoldedSet(target_layers(base.pipeline))
        self._fingerprint = None if base.folded else base.fingerprint
        self.switch(concepts)

    @property
    def concepts(self) -> list[Weighted]:
        """What is folded now, in the order of the digests."""
        return self._folded.concepts

    @property
    def rounded(self) -> bool:
        """Was some concept trained on a rounded copy of this base?"""
        return "rounded" in self._relations.values()

    def switch(self, concepts: Sequence[Weighted]) -> None:
        """Go to another set of concepts; costs what those own that come, go or change weight.

        Raises:
            ConflictError: names, tokens or indices clash, or others are folded into the base.
            BaseMismatch: a concept belongs to another base.
            ConfigError: a weight λ is not finite.
            FormatError: a factor or an embedding does not fit the base.
            NonFiniteError: a folded weight would not be finite.
            On any error nothing is changed.
        """
        relations = self._checked(concepts)
        self._fold(concepts)
        self._relations = relations

    def add(self, concept: Concept, weight: float = 1.0) -> None:
        """Fold one more concept in; raises as `switch` does."""
        self.switch([*self.concepts, (concept, weight)])

    def remove(self, name: str) -> None:
        """Take a concept out; raises as `switch` does."""
        self._known(name)
        self.switch([pair for pair in self.concepts if pair[0].meta.name != name])

    def set_weight(self, name: str, weight: float) -> None:
        """Change a concept's weight λ; raises as `switch` does."""
        self._known(name)
        self.switch([(c, weight if c.meta.name == name else old) for c, old in self.concepts])

    def restore(self) -> None:
        """Put the base's own bytes, vocabulary and embeddings back."""
        self.switch([])

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder for stock diffusers, all of it or nothing.

        Raises:
            ConflictError: the folder exists and is not empty.
            ResourceError: it cannot be written.
        """
        write_folder(folder, lambda unfinished: self._write(unfinished, dtype))

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        self.base.pipeline.save_pretrained(folder)
        if dtype != self.base.pipeline.dtype:
            _convert(folder, dtype)
        for encoder in text_encoders(self.base.pipeline):
            _load_in_fp32_by_default(folder / encoder / "config.json")
        _forget_paths(folder)
        of_base = {
            "base": self.base.public_name,
            "family": self.base.family,
            "rounded_base": self.rounded,
        }
        record = {**of_base, **self._record(dtype)}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if self.concepts:
            text = card(self.concepts, "checkpoint")
            (folder / "README.md").write_text(text, encoding="utf-8")

    def _record(self, dtype: torch.dtype) -> dict[str, Any]:
        return merge_record(self.concepts, self.allow_overlap, dtype)

    def _checked(self, concepts: Sequence[Weighted]) -> dict[str, str]:
        """Whether the concepts belong to this base and may live together; how they relate to it."""
        if self._fingerprint is None or (self.base.folded and not self.concepts):
            raise ConflictError("the base has concepts folded into it", "restore it first")
        relations = {c.meta.digest: self._relation(c, self._fingerprint) for c, _ in concepts}
        check_mergeable([concept for concept, _ in concepts], self.allow_overlap)
        return relations

    def _fold(self, concepts: Sequence[Weighted]) -> None:
        """Make exactly these concepts the folded ones; on any error nothing is changed."""
        step = self._folded.prepare(concepts)
        before = self._folded.concepts
        self.tokens.set(_vectors(step.concepts))
        try:
            self._folded.commit(step)
        except BaseException:
            self.tokens.set(_vectors(before))
            raise
        self.base.folded = bool(step.concepts)

    def _relation(self, concept: Concept, base: Fingerprint) -> str:
        known = self._relations.get(concept.meta.digest)
        return known or compare(concept.meta.fingerprint, base)

    def _known(self, name: str) -> None:
        names = [concept.meta.name for concept, _ in self.concepts]
        if name not in names:
            raise ConflictError(f"no concept {name!r} is folded", f"folded are {sorted(names)}")


def merge_record(
    concepts: Sequence[Weighted], allow_overlap: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """What was merged, without time, host or path; shared indices are listed."""
    ordered = sorted(concepts, key=lambda pair: pair[0].meta.digest)
    shared = overlaps([concept for concept, _ in ordered])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "allow_overlap": allow_overlap,
        "overlaps": [
            {"concepts": list(pair), "layers": len(layers), "indices": sum(layers.values())}
            for pair, layers in sorted(shared.items())
        ],
        "concepts": [
            {
                "name": concept.meta.name,
                "digest": concept.meta.digest,
                "weight": weight,
                "tokens": [entry.token for entry in concept.meta.tokens],
            }
            for concept, weight in ordered
        ],
    }


def _vectors(concepts: Sequence[Weighted]) -> dict[str, torch.Tensor]:
    vectors: dict[str, torch.Tensor] = {}
    for concept, _ in concepts:
        vectors |= concept.embeddings
    return vectors


def _convert(folder: Path, dtype: torch.dtype) -> None:
    """Round the written weights, so that the pipeline in memory stays as it is."""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.rglob("*.safetensors")):
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})


def _load_in_fp32_by_default(config: Path) -> None:
    """Diffusers loads everything in fp32 unless told otherwise, transformers in what the
    configuration notes: a text encoder in fp16 would not fit the rest."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _forget_paths(folder: Path) -> None:
    """Drop where the base was loaded from, so that equal models are equal files."""
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
