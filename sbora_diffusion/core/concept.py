"""The concept file: one `.safetensors` with the trained factors, their indices and a document.

Keys: ``<canonical layer>.indices``, ``<canonical layer>.factor``, ``<canonical layer>.<extra>`` and
``<encoder>.<token>``. The metadata key ``sbora`` holds the document, `ConceptMeta` as compact JSON;
per-layer values stand there in the order of the sorted layer names, which saves repeating them.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.errors import FormatError, IntegrityError, SboraError
from sbora_diffusion.core.fingerprint import LAYER_DIGITS
from sbora_diffusion.core.schema import (
    EMBEDDING_KEY,
    EXTRAS,
    HUB_ID_PATTERN,
    Concept,
    ConceptMeta,
    LayerFactor,
    TokenMeta,
    refuse_extras,
    validate_concept,
)
from sbora_diffusion.core.storage import (
    canonical_json,
    decode,
    dtype_name,
    encode,
    raw_bytes,
    strict_json,
    write_atomically,
)

__all__ = [
    "Concept",
    "ConceptMeta",
    "LayerFactor",
    "TokenMeta",
    "canonical_document",
    "check_mergeable",
    "concept_bytes",
    "concept_of",
    "decode_concept",
    "encode_concept",
    "payload_digest",
    "public_base_name",
    "read_concept",
    "refuse_extras",
    "sealed",
    "validate_concept",
    "write_concept",
]

_REMEDY = "give a concept file written by `sbora train`"

# Family to the names used by modelspec 1.0.1 and by kohya's trainer; other families keep their own.
ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def write_concept(path: str | Path, concept: Concept, overwrite: bool = True) -> str:
    """Validate a concept and write it atomically.

    The same concept gives the same bytes: there is no time, host or path in them.

    Returns:
        The digest, SHA-256 in hexadecimal, that the file carries; `concept.meta.digest` is ignored.

    Raises:
        FormatError, NonFiniteError, CapacityError: the concept is not valid; nothing is written.
        ConfigError: the file exists and `overwrite` is false.
        ResourceError: it cannot be written; an older file of that name is untouched.
    """
    data, digest = concept_bytes(concept)
    write_atomically(Path(path), data, overwrite)
    return digest


def concept_bytes(concept: Concept) -> tuple[bytes, str]:
    """Validate a concept and give the bytes of its file, and the digest that the file carries.

    Raises:
        FormatError, NonFiniteError, CapacityError: the concept is not valid.
    """
    tensors, document = encode_concept(concept)
    metadata = {"sbora": canonical_json(document), **_metadata_for_others(concept.meta)}
    return encode(tensors, metadata), document["digest"]


def encode_concept(concept: Concept) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Validate a concept and give what a file holds: its tensors and its document.

    Raises:
        FormatError, NonFiniteError, CapacityError: the concept is not valid.
    """
    validate_concept(concept)
    tensors, document = _tensors(concept), _document(concept.meta)
    document["digest"] = payload_digest(tensors, document)
    return tensors, document


def sealed(concept: Concept) -> Concept:
    """The same concept with its digest filled in, as reading it back from a file gives it."""
    digest = payload_digest(_tensors(concept), _document(concept.meta))
    meta = concept.meta.model_copy(update={"digest": digest})
    return Concept(meta, concept.layers, concept.embeddings)


def read_concept(path: str | Path) -> Concept:
    """Read a concept file and validate all of it.

    Raises:
        FormatError: not a concept file, or layers, shapes, indices or tokens do not fit together.
        IntegrityError: the payload does not match the digest.
        NonFiniteError: a tensor has NaN or infinite values.
        CapacityError: the range ends beyond the narrowest layer.
        ResourceError: the file cannot be opened.
    """
    return concept_of(path, *decode(Path(path)))


def concept_of(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Concept:
    """The concept in a file that was decoded already.

    Raises:
        FormatError, IntegrityError, NonFiniteError, CapacityError: see `read_concept`.
    """
    try:
        return decode_concept(tensors, _parse(metadata))
    except SboraError as error:
        raise type(error)(f"{path}: {error.problem}", error.remedy) from error


def decode_concept(tensors: Mapping[str, torch.Tensor], document: Any) -> Concept:
    """The inverse of `encode_concept`, validating everything.

    Raises:
        FormatError, IntegrityError, NonFiniteError, CapacityError: see `read_concept`.
    """
    _check_document(document)
    if document["digest"] != payload_digest(tensors, document):
        raise IntegrityError(
            "the content does not match its digest, the file is damaged",
            "copy or download it again",
        )
    layers, embeddings = _grouped(tensors)
    meta = _meta(document, sorted(layers))
    _refuse_other_spellings(document, meta)
    concept = Concept(meta, layers, embeddings)
    validate_concept(concept)
    return concept


def public_base_name(reference: str) -> str:
    """The base reference if it means something elsewhere ("pocket", a hub id), else ""."""
    if reference == "pocket":
        return reference
    is_hub_id = re.fullmatch(HUB_ID_PATTERN, reference) and not Path(reference).exists()
    return reference if is_hub_id else ""


def _tensors(concept: Concept) -> dict[str, torch.Tensor]:
    tensors = dict(concept.embeddings)
    for layer, stored in concept.layers.items():
        tensors[f"{layer}.indices"] = stored.indices
        tensors[f"{layer}.factor"] = stored.factor
        tensors |= {f"{layer}.{name}": extra for name, extra in stored.extras.items()}
    return tensors


def _grouped(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, LayerFactor], dict[str, torch.Tensor]]:
    """The inverse of `_tensors`."""
    embeddings = {key: value for key, value in tensors.items() if EMBEDDING_KEY.fullmatch(key)}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors.keys() - embeddings.keys():
        layer, _, part = key.rpartition(".")
        parts.setdefault(layer, {})[part] = tensors[key]
    _refuse("unknown", [f"{x}.{p}" for x in parts for p in parts[x].keys() - _PARTS - EXTRAS])
    _refuse("missing", [f"{x}.{p}" for x in parts for p in _PARTS - parts[x].keys()])
    layers = {
        layer: LayerFactor(found.pop("indices"), found.pop("factor"), found)
        for layer, found in sorted(parts.items())
    }
    return layers, embeddings


_PARTS = frozenset({"indices", "factor"})


def _refuse(kind: str, keys: list[str]) -> None:
    if keys:
        first = [key[:200] for key in sorted(keys)[:3]]
        raise FormatError(f"{len(keys)} {kind} tensors, first {first}", _REMEDY)


def _document(meta: ConceptMeta) -> dict[str, Any]:
    document = meta.model_dump(mode="json", exclude={"digest"})
    layers = sorted(meta.fingerprint)
    document["fingerprint"] = "".join(meta.fingerprint[layer] for layer in layers)
    document["widths"] = [meta.widths[layer] for layer in layers]
    return document


def _meta(document: dict[str, Any], layers: list[str]) -> ConceptMeta:
    """The inverse of `_document`, given the sorted layer names."""
    digits, widths = document.get("fingerprint"), document.get("widths")
    if not isinstance(digits, str) or not isinstance(widths, list):
        raise FormatError("the document has no fingerprint or no widths", _REMEDY)
    if len(digits) != len(layers) * LAYER_DIGITS or len(widths) != len(layers):
        described = f"{len(digits) // LAYER_DIGITS} fingerprints and {len(widths)} widths"
        raise FormatError(
            f"the file has {len(layers)} layers, first {layers[:3]}, its document {described}",
            _REMEDY,
        )
    chunks = [digits[i : i + LAYER_DIGITS] for i in range(0, len(digits), LAYER_DIGITS)]
    per_layer = {
        "fingerprint": dict(zip(layers, chunks, strict=True)),
        "widths": dict(zip(layers, widths, strict=True)),
    }
    try:
        return ConceptMeta.model_validate(document | per_layer)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "range"
        raise FormatError(f"{field[:200]} in the document: {first['msg']}", _REMEDY) from error


def _refuse_other_spellings(document: dict[str, Any], meta: ConceptMeta) -> None:
    """Pydantic reads "4" and 4.0 as 4; a file says one thing in one way."""
    own = _document(meta)
    for key, value in document.items():
        if key != "digest" and canonical_json(value) != canonical_json(own[key]):
            raise FormatError(f"{key} in the document must be {own[key]!r:.200}", _REMEDY)


def _parse(metadata: Mapping[str, str]) -> Any:
    if "sbora" not in metadata:
        raise FormatError("a safetensors file, but not a concept file", _REMEDY)
    return canonical_document(metadata["sbora"])


def canonical_document(text: str) -> Any:
    """Parse a document that must be written in the one canonical way.

    Raises:
        FormatError: it is not.
    """
    try:
        document = strict_json(text)
        if canonical_json(document) != text:
            raise ValueError("not in its canonical form")
    except ValueError as error:
        raise FormatError(f"the document is not valid JSON: {error}", _REMEDY) from error
    return document


def _check_document(document: Any) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("digest"), str):
        raise FormatError("the document has no digest", _REMEDY)
    if document.get("format_version") != 1:
        raise FormatError(
            f"format version {str(document.get('format_version'))[:20]!r}, this program reads 1",
            "update sbora-diffusion",
        )


def payload_digest(tensors: Mapping[str, torch.Tensor], document: dict[str, Any]) -> str:
    """SHA-256 of every tensor in the order of the keys, then of the document without its digest."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        shape = ",".join(map(str, tensors[key].shape))
        digest.update(
            f"{key}\0{dtype_name(tensors[key].dtype)}\0{shape}\0".encode("utf-8", "surrogatepass")
        )
        digest.update(raw_bytes(tensors[key]))
    undigested = {key: value for key, value in document.items() if key != "digest"}
    digest.update(canonical_json(undigested).encode())
    return digest.hexdigest()


def _metadata_for_others(meta: ConceptMeta) -> dict[str, str]:
    """What other tools show: modelspec 1.0.1 and kohya's keys."""
    architecture, kohya = ARCHITECTURES.get(meta.family, (meta.family, meta.family))
    description = (
        f"{meta.class_noun}, learned with SBoRA-{meta.variant.upper()} of rank {meta.rank}"
    )
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/sbora",
        "modelspec.implementation": "sbora-diffusion",
        "modelspec.title": meta.name,
        "modelspec.description": description,
        "modelspec.trigger_phrase": " ".join(entry.token for entry in meta.tokens),
        "ss_network_module": "sbora_diffusion",
        "ss_network_dim": str(meta.rank),
        "ss_network_alpha": str(meta.alpha),
        "ss_base_model_version": kohya,
        "ss_output_name": meta.name,
    }
