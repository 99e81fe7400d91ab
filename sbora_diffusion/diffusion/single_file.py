"""Concepts folded into a checkpoint of one file, as A1111 and ComfyUI use them.

The file keeps all that it holds, autoencoder and odd keys included: only the columns or rows that
the concepts own change. Nothing is converted, so no other tool's idea of the model comes in.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, IntegrityError
from sbora_diffusion.core.fingerprint import compare, fingerprint
from sbora_diffusion.core.folded_set import FoldedSet, Weighted
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.storage import canonical_json
from sbora_diffusion.diffusion.formats import embedding_files, write_embeddings
from sbora_diffusion.diffusion.lora_files import load_tensors
from sbora_diffusion.diffusion.lora_names import KOHYA_PREFIXES, numbered_blocks
from sbora_diffusion.diffusion.merging import RECORD, merge_record
from sbora_diffusion.diffusion.model_card import card, model_metadata, title_of

_UNET = "model.diffusion_model."
_CLIP = {  # CLIP as transformers names it, in checkpoints of one and of two text encoders
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
}
_OPEN_CLIP = {  # CLIP as open_clip names it, with the weights of q, k and v in one tensor
    "text_encoder": "cond_stage_model.model.transformer.resblocks.",
    "text_encoder_2": "conditioner.embedders.1.model.transformer.resblocks.",
}
_SELF_ATTENTION = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.(q|k|v|out)_proj")


class Place(NamedTuple):
    """Where a layer's weight stands in a checkpoint.

    Attributes:
        key: name of the tensor.
        third: 0, 1 or 2 where the tensor has the weights of q, k and v one under the other.
    """

    key: str
    third: int | None = None

    def weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A view of the weight, (out, in)."""
        found = tensors[self.key]
        return found if self.third is None else found.chunk(3)[self.third]


def places(layer: str) -> list[Place]:
    """Where the weight of a layer may stand, by the kinds of checkpoints there are."""
    component, _, path = layer.partition(".")
    if component == "unet":
        return [Place(f"{_UNET}{numbered_blocks(path)}.weight")]
    found = [Place(f"{prefix}{path}.weight") for prefix in _CLIP.get(component, ())]
    match = _SELF_ATTENTION.fullmatch(path)
    if match and component in _OPEN_CLIP:
        block = f"{_OPEN_CLIP[component]}{match[1]}.attn"
        joined = Place(f"{block}.in_proj_weight", "qkv".find(match[2]))
        found.append(Place(f"{block}.out_proj.weight") if match[2] == "out" else joined)
    return found


def write_single_file(
    folder: Path,
    base: Path,
    concepts: Sequence[Weighted],
    allow_overlap: bool = False,
    dtype: torch.dtype | None = None,
) -> bool:
    """Write a folder with the checkpoint, the embeddings of the tokens and a model card.

    Every owned entry becomes cast(fp32(W0) + Σ λ·scale·Δ) in the type that the file has.

    Args:
        base: a `.safetensors` checkpoint.
        dtype: of all floating-point tensors; by default each stays as it is.

    Returns:
        Whether some concept was trained on a rounded copy of this base, which deserves a warning.

    Raises:
        FormatError: the base is no `.safetensors` file.
        BaseMismatch: it is not the concepts' base.
        ConfigError: no such files are known for its family.
        ConflictError: the concepts clash, or the folder exists and is not empty.
        NonFiniteError: a folded weight would not be finite.
        IntegrityError: what was written reads back differently; nothing is left.
        ResourceError: the folder cannot be written.
    """
    check_mergeable([concept for concept, _ in concepts], allow_overlap)
    tensors, metadata = load_tensors(base)
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    found = _found(tensors, concepts)
    rounded = _checked(tensors, found, concepts)
    _fold(tensors, found, concepts)
    record = merge_record(concepts, allow_overlap, next(iter(found.values())).weight(tensors).dtype)
    record |= {"family": concepts[0][0].meta.family, "rounded_base": rounded}
    said = {"sbora": canonical_json(record), **model_metadata(concepts)}
    name = f"{title_of(concepts)}.safetensors"

    def fill(unfinished: Path) -> None:
        save_file(tensors, unfinished / name, {**metadata, **said})
        _refuse_difference(tensors, {place.key for place in found.values()}, unfinished / name)
        write_embeddings(unfinished, embedding_files(concepts))
        (unfinished / "README.md").write_text(card(concepts, "file", name), encoding="utf-8")
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return rounded


def _found(tensors: Mapping[str, Tensor], concepts: Sequence[Weighted]) -> dict[str, Place]:
    layers = sorted({layer for concept, _ in concepts for layer in concept.layers})
    if not all(map(places, layers)):
        raise ConfigError(
            f"checkpoints of one file are known for {', '.join(sorted(KOHYA_PREFIXES))}, not for "
            f"{concepts[0][0].meta.family}",
            "give a base in diffusers' layout",
        )
    found = {layer: place for layer in layers for place in places(layer) if place.key in tensors}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise BaseMismatch(
            f"the checkpoint lacks {len(missing)} of {len(layers)} adapted layers, first "
            f"{missing[0]!r}",
            "give the concepts' own base with --base",
        )
    return found


def _checked(
    tensors: Mapping[str, Tensor], found: Mapping[str, Place], concepts: Sequence[Weighted]
) -> bool:
    base = fingerprint((layer, place.weight(tensors)) for layer, place in found.items())
    relations = [compare(concept.meta.fingerprint, base) for concept, _ in concepts]
    return "rounded" in relations


def _fold(
    tensors: Mapping[str, Tensor], found: Mapping[str, Place], concepts: Sequence[Weighted]
) -> None:
    layers = {}
    for layer, place in found.items():
        layers[layer] = linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(place.weight(tensors), requires_grad=False)
    FoldedSet(layers).switch(concepts)


def _refuse_difference(tensors: Mapping[str, Tensor], changed: set[str], path: Path) -> None:
    found, _ = load_tensors(path)
    wrong = [key for key in changed if not torch.equal(tensors[key], found[key])]
    if wrong or found.keys() != tensors.keys():
        raise IntegrityError(f"{len(wrong)} weights read back differently", "check the disk")
