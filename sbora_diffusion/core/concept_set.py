"""The concept-set file: one `.safetensors` with whole concepts, each with its weight.

Keys: ``<concept name>:<key>``, where <key> is a key of the concept file. The metadata key
``sbora_set`` holds the document: format version, whether shared indices were allowed, and for each
concept, in the order of the digests, its weight λ and the document of its concept file; at last the
SHA-256 of all that. The digests of the concepts cover the tensors.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.concept import (
    Concept,
    LayerFactor,
    canonical_document,
    concept_of,
    decode_concept,
    encode_concept,
)
from sbora_diffusion.core.errors import ConfigError, FormatError, IntegrityError, SboraError
from sbora_diffusion.core.storage import canonical_json, decode, encode, write_atomically

KEY = "sbora_set"
_FIELDS = {"format_version", "allow_overlap", "concepts", "digest"}
_REMEDY = "give a concept set written by `sbora merge --as set`"


@dataclass(frozen=True, eq=False)
class ConceptSet:
    """Concepts that may live in one model.

    Attributes:
        concepts: concepts with their weights λ.
        allow_overlap: whoever put them together allowed concepts of one variant to share indices.
        digest: of the set file; empty where there is none.
    """

    concepts: tuple[tuple[Concept, float], ...]
    allow_overlap: bool = False
    digest: str = ""


def write_concept_set(
    path: str | Path,
    concepts: Sequence[tuple[Concept, float]],
    allow_overlap: bool = False,
    overwrite: bool = True,
) -> str:
    """Write concepts and their weights into one file, atomically.

    The bytes depend neither on the order of `concepts` nor on time, host or path.

    Returns:
        The digest, SHA-256 in hexadecimal, that the file carries.

    Raises:
        ConfigError: no concept is given, a weight is not finite, or the file exists and `overwrite`
            is false.
        BaseMismatch, ConflictError: the concepts cannot live in one model.
        FormatError, NonFiniteError, CapacityError: a concept is not valid.
        ResourceError: it cannot be written; an older file of that name is untouched.
    """
    _check(concepts, allow_overlap)
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for concept, weight in concepts:
        own, document = encode_concept(concept)
        tensors |= {f"{concept.meta.name}:{key}": value for key, value in own.items()}
        entries.append({"weight": float(weight), "document": document})
    entries.sort(key=_digest_of)
    document = {"format_version": 1, "allow_overlap": allow_overlap, "concepts": entries}
    document["digest"] = _digest(document)
    write_atomically(Path(path), encode(tensors, {KEY: canonical_json(document)}), overwrite)
    return document["digest"]


def read_concept_set(path: str | Path) -> ConceptSet:
    """Read a set file and validate all of it.

    Raises:
        FormatError: not a concept set, or its parts do not fit together.
        IntegrityError: the content does not match a digest.
        BaseMismatch, ConflictError: the concepts cannot live in one model.
        NonFiniteError, CapacityError, ResourceError: see `read_concept`.
    """
    return _set_of(path, *decode(Path(path)))


def read_concepts(path: str | Path) -> ConceptSet:
    """What a concept file (one concept, weight 1) or a concept set holds.

    Raises:
        See `read_concept` and `read_concept_set`.
    """
    tensors, metadata = decode(Path(path))
    if KEY in metadata:
        return _set_of(path, tensors, metadata)
    return ConceptSet(((concept_of(path, tensors, metadata), 1.0),))


def read_member(path: str | Path, name: str) -> Concept:
    """The concept of that name in a concept file or a concept set.

    Raises:
        ConfigError: there is none.
        See also `read_concept` and `read_concept_set`.
    """
    found = {concept.meta.name: concept for concept, _ in read_concepts(path).concepts}
    if name not in found:
        raise ConfigError(f"{path} holds no concept {name!r}", f"it holds {sorted(found)}")
    return found[name]


def rounded_concept(concept: Concept, dtype: torch.dtype) -> Concept:
    """The concept with every number that is wider than `dtype` rounded to it.

    What is as wide or narrower stays, so that fp32 changes nothing and the digest remains.
    """

    def narrow(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype) if values.element_size() > dtype.itemsize else values

    layers = {
        layer: LayerFactor(
            stored.indices,
            narrow(stored.factor),
            {name: narrow(extra) for name, extra in stored.extras.items()},
        )
        for layer, stored in concept.layers.items()
    }
    embeddings = {key: narrow(vectors) for key, vectors in concept.embeddings.items()}
    return Concept(concept.meta, layers, embeddings)


def _check(concepts: Sequence[tuple[Concept, float]], allow_overlap: bool) -> None:
    if not concepts:
        raise ConfigError("a concept set needs at least one concept", "name a concept file")
    for concept, weight in concepts:
        if not math.isfinite(weight):
            raise ConfigError(
                f"the weight of {concept.meta.name!r} must be a finite number, got {weight}"
            )
    check_mergeable([concept for concept, _ in concepts], allow_overlap)


def _set_of(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> ConceptSet:
    try:
        if KEY not in metadata:
            raise FormatError("a safetensors file, but not a concept set", _REMEDY)
        return _decoded(tensors, canonical_document(metadata[KEY]))
    except SboraError as error:
        raise type(error)(f"{path}: {error.problem}", error.remedy) from error


def _decoded(tensors: Mapping[str, torch.Tensor], document: Any) -> ConceptSet:
    entries = _entries(document)
    members: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, own = key.partition(":")
        members.setdefault(name, {})[own] = value
    names = [entry["document"].get("name") for entry in entries]
    if sorted(map(str, names)) != sorted(members):
        raise FormatError("the tensors are not those of the listed concepts", _REMEDY)
    concepts = tuple(
        (decode_concept(members[entry["document"]["name"]], entry["document"]), entry["weight"])
        for entry in entries
    )
    check_mergeable([concept for concept, _ in concepts], document["allow_overlap"])
    return ConceptSet(concepts, document["allow_overlap"], document["digest"])


def _entries(document: Any) -> list[dict[str, Any]]:
    """The listed concepts of a document that has the right form and digest."""
    if not isinstance(document, dict) or document.get("format_version") != 1:
        raise FormatError("the document of the set has no known format version", _REMEDY)
    entries = document.get("concepts")
    if document.keys() != _FIELDS or not isinstance(document["allow_overlap"], bool):
        raise FormatError(f"the document of the set must have {sorted(_FIELDS)}", _REMEDY)
    if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
        raise FormatError("the document of the set lists no concepts with weights", _REMEDY)
    if entries != sorted(entries, key=_digest_of):
        raise FormatError("the concepts are not in the order of their digests", _REMEDY)
    if document["digest"] != _digest(document):
        raise IntegrityError(
            "the list of concepts does not match its digest, the file is damaged",
            "copy or download it again",
        )
    return entries


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"weight", "document"}
        and isinstance(entry["weight"], float)
        and isinstance(entry["document"], dict)
        and isinstance(entry["document"].get("digest"), str)
    )


def _digest_of(entry: dict[str, Any]) -> str:
    return entry["document"]["digest"]


def _digest(document: dict[str, Any]) -> str:
    undigested = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(canonical_json(undigested).encode()).hexdigest()
