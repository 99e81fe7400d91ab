"""Concepts out of other tools' files: exports of this package, and folders of its PEFT tuner.

An export's documents say which ranks of the LoRA are whose, so the concepts come back, with the
digests they had. Whether the LoRA is still theirs is found out by exporting them again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sbora_diffusion.core.allocation import indices_for
from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.concept import canonical_document, decode_concept, payload_digest, sealed
from sbora_diffusion.core.concept_set import ConceptSet
from sbora_diffusion.core.errors import BaseMismatch, FormatError, IntegrityError
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.core.lora import LoraLayer, lora_layers
from sbora_diffusion.core.schema import FLOATS, Concept, ConceptMeta, LayerFactor, validate_concept
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.formats import DOCUMENTS, EMBEDDINGS
from sbora_diffusion.diffusion.lora_files import (
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    LoraFile,
    load_tensors,
    peft_folders,
    read_lora,
    read_peft_config,
)
from sbora_diffusion.diffusion.model_card import ENCODERS
from sbora_diffusion.diffusion.targets import target_layers

_REMEDY = "give what `sbora export` wrote, or bring an ordinary LoRA in with --project CONCEPT"


class _Entry(BaseModel):
    """One concept of an export."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weight: float
    layers: int
    document: dict[str, Any]


class _Documents(BaseModel):
    """What an export says about its concepts, in the order of their ranks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    allow_overlap: bool
    layers: list[list[str]]
    concepts: list[_Entry]


def import_export(path: Path) -> ConceptSet:
    """The concepts that `sbora export` wrote as a LoRA, with their weights.

    From an export in half precision they come rounded, with digests of their own.

    Args:
        path: the folder or the LoRA in it; the embeddings are looked for in `embeddings/` there.

    Raises:
        FormatError: it is no export of this package, or a part of it is missing.
        IntegrityError: the LoRA is not, or not only, that of these concepts.
        BaseMismatch, ConflictError, NonFiniteError, CapacityError: see `read_concept_set`.
    """
    file = read_lora(path)
    if DOCUMENTS not in file.metadata:
        raise FormatError(f"{path} is no export of this program", _REMEDY)
    try:
        documents = _Documents.model_validate(canonical_document(file.metadata[DOCUMENTS]))
        vectors = _embeddings(path if path.is_dir() else path.parent, documents)
        concepts = tuple(_concepts(file.layers, documents, vectors))
    except (ValidationError, LookupError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FormatError(f"the documents in {path} are damaged: {reason}", _REMEDY) from error
    _refuse_other_factors(path, file, _as_exported(concepts, documents))
    check_mergeable([concept for concept, _ in concepts], documents.allow_overlap)
    return ConceptSet(concepts, documents.allow_overlap)


def _concepts(
    layers: Mapping[str, LoraLayer], documents: _Documents, vectors: Mapping[str, Tensor]
) -> list[Weighted]:
    found, first = [], 0
    for entry in documents.concepts:
        document, names = entry.document, documents.layers[entry.layers]
        ranks = slice(first, first + document["rank"])
        tokens = [token["token"] for token in document["tokens"]]
        own = {key: rows for key, rows in vectors.items() if key.partition(".")[2] in tokens}
        tensors = own | _tensors(layers, document, names, ranks)
        found.append((_readopted(tensors, document), entry.weight))
        first = ranks.stop
    return found


def _tensors(
    layers: Mapping[str, LoraLayer], document: dict[str, Any], names: list[str], ranks: slice
) -> dict[str, Tensor]:
    """What a concept file stores for each layer; the indices follow from the range."""
    place = document["start"], document["stop"], document["allocation_seed"]
    tensors = {}
    for name, width in zip(names, document["widths"], strict=True):
        fa = document["variant"] == "fa"
        factor = layers[name].up[:, ranks] if fa else layers[name].down[ranks]
        tensors[f"{name}.factor"] = factor.contiguous()
        tensors[f"{name}.indices"] = indices_for(name, width, *place)
    return tensors


def _readopted(tensors: dict[str, Tensor], document: dict[str, Any]) -> Concept:
    """The concept in the type that gives the digest it had; as it is, sealed anew, if none does."""
    for dtype in FLOATS:
        cast = {k: v if k.endswith(".indices") else v.to(dtype) for k, v in tensors.items()}
        if payload_digest(cast, document) == document["digest"]:
            return decode_concept(cast, document)
    return decode_concept(tensors, {**document, "digest": payload_digest(tensors, document)})


def _as_exported(concepts: Iterable[Weighted], documents: _Documents) -> list[Weighted]:
    """The concepts with the digests that they had, which gave their ranks an order."""
    found = []
    for (concept, weight), entry in zip(concepts, documents.concepts, strict=True):
        meta = concept.meta.model_copy(update={"digest": entry.document["digest"]})
        found.append((Concept(meta, concept.layers, concept.embeddings), weight))
    return found


def _refuse_other_factors(path: Path, file: LoraFile, concepts: list[Weighted]) -> None:
    """Raise IntegrityError unless the concepts, exported again, give these factors."""
    unit = all(lora.scale == 1.0 for lora in file.layers.values())
    expected = lora_layers(concepts, unit_scale=unit)
    wrong = sorted(expected.keys() ^ file.layers.keys())
    for name in expected.keys() & file.layers.keys():
        found = file.layers[name]
        again = expected[name].to(found.up.dtype)
        if not (torch.equal(again.down, found.down) and torch.equal(again.up, found.up)):
            wrong.append(name)
    if wrong:
        raise IntegrityError(
            f"{path}: {len(wrong)} layers were changed since the export, first {wrong[0]!r}",
            "bring it in as an ordinary LoRA with --project CONCEPT",
        )


def _embeddings(folder: Path, documents: _Documents) -> dict[str, Tensor]:
    """Key of the concept file to vectors, for every token of the documents."""
    encoders = {name: encoder for encoder, name in ENCODERS.items()}
    found = {}
    for entry in documents.concepts:
        for token in (each["token"] for each in entry.document["tokens"]):
            file = folder / EMBEDDINGS / f"{token.strip('<>')}.safetensors"
            if not file.is_file():
                raise FormatError(f"{file} is missing", "put the export's embeddings there")
            for name, rows in load_tensors(file)[0].items():
                found[f"{encoders.get(name, 'text_encoder')}.{token}"] = rows
    return found


def is_adapter(path: Path) -> bool:
    """Is it what this package's PEFT tuner saves?"""
    return any(isinstance(read_peft_config(f), SboraConfig) for f in peft_folders(path))


def import_adapter(path: Path, base: Base, name: str, class_noun: str) -> Concept:
    """A concept out of what `save_pretrained` wrote for this package's PEFT tuner.

    Args:
        path: a PEFT folder, or a folder with one for each model of a pipeline. Its `name_prefix`
            must be the model's, e.g. "unet.", since the indices come from canonical names.
        base: what the adapter was trained on.

    Raises:
        FormatError: it is no such folder, or the indices are not those of its range.
        BaseMismatch: the base lacks a layer.
    """
    configs: list[SboraConfig] = []
    layers: dict[str, LayerFactor] = {}
    for folder in peft_folders(path):
        config = read_peft_config(folder)
        if not isinstance(config, SboraConfig):
            raise FormatError(f"{folder} is no SBoRA adapter but {config.peft_type}", _REMEDY)
        configs.append(config)
        layers |= _adapter_layers(folder, config)
    if not layers:
        raise FormatError(f"{path} holds no PEFT adapter", _REMEDY)
    meta = _adapter_meta(path, configs, layers, base, name, class_noun)
    concept = Concept(meta, layers)
    validate_concept(concept)
    return sealed(concept)


def _adapter_layers(folder: Path, config: SboraConfig) -> dict[str, LayerFactor]:
    tensors, _ = load_tensors(folder / PEFT_WEIGHTS)
    end = ".sbora_factor"
    names = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    missing = [name for name in names if f"{name}.sbora_indices" not in tensors]
    if missing or len(tensors) != 2 * len(names):
        raise FormatError(
            f"{folder} has {len(tensors)} tensors for {len(names)} layers",
            "only factors and indices make a concept",
        )
    return {
        config.name_prefix + name.removeprefix(PEFT_PREFIX): LayerFactor(
            tensors[f"{name}.sbora_indices"], tensors[name + end]
        )
        for name in names
    }


def _adapter_meta(
    path: Path,
    configs: list[SboraConfig],
    layers: Mapping[str, LayerFactor],
    base: Base,
    name: str,
    class_noun: str,
) -> ConceptMeta:
    kinds = {(c.variant, c.r, c.alpha, c.index_range, c.allocation_seed) for c in configs}
    if len(kinds) > 1:
        raise FormatError(f"the adapters in {path} differ in variant, rank or range", _REMEDY)
    variant, rank, alpha, (start, stop), seed = kinds.pop()
    targets, side = target_layers(base.pipeline), 1 if variant == "fa" else 0
    missing = sorted(layers.keys() - targets.keys())
    if missing:
        raise BaseMismatch(
            f"the base lacks {len(missing)} of {len(layers)} adapted layers, first {missing[0]!r}",
            "give the base that the adapter was trained on, and check its name_prefix",
        )
    return ConceptMeta(
        name=name,
        variant=variant,
        rank=rank,
        alpha=float(alpha or rank),
        slot=None,
        start=start,
        stop=stop,
        allocation_seed=seed,
        family=base.family,
        base_name=base.public_name,
        fingerprint={layer: base.fingerprint[layer] for layer in layers},
        widths={layer: targets[layer].weight.shape[side] for layer in layers},
        class_noun=class_noun,
    )
