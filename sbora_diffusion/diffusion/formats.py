"""Concepts in other tools' files: one LoRA, the embeddings of its tokens, a model card.

An export is a new folder that appears whole, and only after its LoRA was read back:

    NAME.safetensors          the LoRA (kohya); `pytorch_lora_weights.safetensors` for diffusers;
    unet/, text_encoder/      … for PEFT, one adapter for each model
    embeddings/WORD.safetensors
    README.md, sbora.json     for people; what was exported

The LoRA's metadata has the documents of its concepts, so that `imports.py` gets them back.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.concept import encode_concept
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.lora import LoraLayer, lora_layers
from sbora_diffusion.core.storage import canonical_json, encode, write_atomically
from sbora_diffusion.diffusion.lora_files import (
    diffusers_tensors,
    encode_hashed,
    kohya_tensors,
    refuse_difference,
    write_peft,
)
from sbora_diffusion.diffusion.merging import RECORD, merge_record
from sbora_diffusion.diffusion.model_card import ENCODERS, card, lora_metadata, title_of

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
EMBEDDINGS = "embeddings"
DOCUMENTS = "sbora_concepts"
"""The metadata key with the documents of the concepts."""
LoraForm = Literal["kohya", "diffusers", "peft"]


def write_lora(
    folder: Path,
    concepts: Sequence[Weighted],
    allow_overlap: bool = False,
    dtype: torch.dtype = torch.float32,
    form: LoraForm = "diffusers",
) -> list[Path]:
    """Write a folder with one LoRA of all concepts and an embeddings file for each token.

    The bytes do not depend on the order of `concepts`, nor on time, host or path.

    Args:
        form: "kohya" is read by ComfyUI, A1111, Forge and diffusers; "diffusers" by
            `load_lora_weights`, "peft" by `PeftModel.from_pretrained`.

    Returns:
        The files with the embeddings.

    Raises:
        BaseMismatch, ConflictError: the concepts cannot live in one model, or the folder exists and
            is not empty.
        ConfigError: the form has no names for the base's family.
        FormatError: see `refuse_extras`.
        IntegrityError: what was written reads back differently; nothing is left.
        NonFiniteError: a number does not fit into `dtype`.
        ResourceError: the folder cannot be written.
    """
    check_mergeable([concept for concept, _ in concepts], allow_overlap)
    record = merge_record(concepts, allow_overlap, dtype)
    layers = {
        layer: lora.to(dtype)
        for layer, lora in lora_layers(concepts, unit_scale=form == "diffusers").items()
    }
    embeddings = embedding_files(concepts, dtype)

    def fill(unfinished: Path) -> None:
        weights = _write_layers(unfinished, layers, form, concepts, record)
        refuse_difference(layers, unfinished / weights)
        write_embeddings(unfinished, embeddings)
        (unfinished / "README.md").write_text(card(concepts, form, weights), encoding="utf-8")
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return [folder / EMBEDDINGS / name for name in sorted(embeddings)]


def embedding_files(
    concepts: Sequence[Weighted], dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Tensor]]:
    """File name to content, for each token: the word that people write is the file's name.

    With one text encoder the only tensor is named after the token, which diffusers takes as such;
    A1111 and ComfyUI take whatever is there. With several, they know them by `ENCODERS`.

    Raises:
        NonFiniteError: a number does not fit into `dtype`.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for concept, _ in concepts:
        several = len({key.partition(".")[0] for key in concept.embeddings}) > 1
        for key, rows in concept.embeddings.items():
            encoder, _, token = key.partition(".")
            name = ENCODERS[encoder] if several else token
            file = files.setdefault(f"{token.strip('<>')}.safetensors", {})
            file[name] = rows.to(dtype)
            if not file[name].isfinite().all():
                raise NonFiniteError(f"{token} does not fit into {dtype}", "use fp32")
    return files


def write_embeddings(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `embedding_files` into the folder's `embeddings/`."""
    if files:
        (folder / EMBEDDINGS).mkdir()
    for name, tensors in files.items():
        write_atomically(folder / EMBEDDINGS / name, encode(tensors, {"format": "pt"}))


def _write_layers(
    folder: Path,
    layers: dict[str, LoraLayer],
    form: LoraForm,
    concepts: Sequence[Weighted],
    record: dict[str, Any],
) -> str:
    """Write the LoRA; the name of the file that holds it, "" for folders."""
    meta = concepts[0][0].meta
    metadata = {
        "format": "pt",
        "sbora": canonical_json(record),
        DOCUMENTS: canonical_json(_documents(concepts, record["allow_overlap"])),
        **lora_metadata(concepts, next(iter(layers.values()))),
    }
    if form == "peft":
        write_peft(folder, layers, metadata, meta)
        return ""
    kohya = form == "kohya"
    tensors = kohya_tensors(layers, meta.family) if kohya else diffusers_tensors(layers)
    name = f"{title_of(concepts)}.safetensors" if kohya else LORA_FILE
    write_atomically(folder / name, encode_hashed(tensors, metadata))
    return name


def _documents(concepts: Sequence[Weighted], allow_overlap: bool) -> dict[str, Any]:
    """The concepts' documents and layers, in the order of their ranks; a list of layers that
    several share stands there once."""
    ordered = sorted(concepts, key=lambda pair: pair[0].meta.digest)
    lists = sorted({tuple(sorted(concept.layers)) for concept, _ in ordered})
    entries = [
        {
            "weight": float(weight),
            "layers": lists.index(tuple(sorted(concept.layers))),
            "document": encode_concept(concept)[1],
        }
        for concept, weight in ordered
    ]
    names = [list(layers) for layers in lists]
    return {"allow_overlap": allow_overlap, "layers": names, "concepts": entries}
