"""Concepts folded into one model that stock diffusers loads."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import ConflictError, ResourceError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.merging import Originals, Update, fold, restore
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import token_vectors
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens

RECORD = "sbora.json"


class Merged:
    """Concepts folded in place; `restore()` gives the base back bit for bit.

    Every owned entry becomes cast(fp32(W0) + Σ λ·scale·Δ), summed in the order of the concepts'
    digests, so the order in which they are given does not matter.

    Args:
        base: unfolded and without adapters.
        concepts: concepts with their weights λ.
        allow_overlap: accept concepts of one variant that share indices.

    Raises:
        BaseMismatch, ConflictError: nothing was changed.
        NonFiniteError: a folded weight would not be finite; nothing was changed.
    """

    def __init__(
        self, base: Base, concepts: Sequence[tuple[Concept, float]], allow_overlap: bool = False
    ):
        if base.folded:
            raise ConflictError("the base has concepts folded into it", "restore it first")
        relations = [compare(c.meta.fingerprint, base.fingerprint) for c, _ in concepts]
        check_mergeable([concept for concept, _ in concepts], allow_overlap)
        self.rounded = "rounded" in relations
        self.base, self.concepts = base, sorted(concepts, key=lambda pair: pair[0].meta.digest)
        self.tokens = PlaceholderTokens(base.pipeline)
        vectors: dict[str, torch.Tensor] = {}
        for concept, _ in self.concepts:
            vectors |= token_vectors(concept)
        self.tokens.add(vectors)
        self._originals = self._fold()
        base.folded = True

    def _fold(self) -> dict[str, Originals]:
        layers = target_layers(self.base.pipeline)
        originals: dict[str, Originals] = {}
        try:
            for name in sorted({n for c, _ in self.concepts for n in c.layers}):
                originals[name] = fold(layers[name].weight, layer_updates(self.concepts, name))
        except Exception:
            _restore(self.base, originals)
            self.tokens.set({})
            raise
        return originals

    def restore(self) -> None:
        """Put the base's own bytes, vocabulary and embeddings back."""
        _restore(self.base, self._originals)
        self.tokens.set({})
        self.base.folded = False

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder for stock diffusers, all of it or nothing.

        Raises:
            ConflictError: the folder exists and is not empty.
            ResourceError: it cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConflictError(f"{folder} exists and is not empty", "give another --output")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=".sbora-", dir=folder.parent))
        except OSError as error:
            raise ResourceError(f"{folder} cannot be written: {error.strerror}") from error
        try:
            self._write(unfinished, dtype)
            unfinished.chmod(0o777 & ~_umask())
            os.replace(unfinished, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResourceError(f"{folder} cannot be written: {reason}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        self.base.pipeline.save_pretrained(folder)
        if dtype != self.base.pipeline.dtype:
            _convert(folder, dtype)
        _load_in_fp32_by_default(folder / "text_encoder" / "config.json")
        _forget_paths(folder)
        (folder / RECORD).write_text(json.dumps(self._record(dtype), indent=2) + "\n")

    def _record(self, dtype: torch.dtype) -> dict:
        """What was merged, without time, host or path."""
        return {
            "base": self.base.public_name,
            "family": self.base.family,
            "rounded_base": self.rounded,
            "dtype": str(dtype).removeprefix("torch."),
            "concepts": [
                {
                    "name": concept.meta.name,
                    "digest": concept.meta.digest,
                    "weight": weight,
                    "tokens": [entry.token for entry in concept.meta.tokens],
                }
                for concept, weight in self.concepts
            ],
        }


def layer_updates(concepts: Sequence[tuple[Concept, float]], layer: str) -> list[Update]:
    """Each concept's share of one layer, with scale λ·alpha/rank."""
    return [
        Update(
            key=concept.meta.digest,
            variant=concept.meta.variant,
            indices=concept.layers[layer].indices,
            factor=concept.layers[layer].factor,
            scale=scaling(concept.meta.alpha, concept.meta.rank, weight),
        )
        for concept, weight in concepts
        if layer in concept.layers
    ]


def _restore(base: Base, originals: dict[str, Originals]) -> None:
    layers = target_layers(base.pipeline)
    for name, kept in originals.items():
        restore(layers[name].weight, kept)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
