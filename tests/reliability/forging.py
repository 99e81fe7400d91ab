"""Concept files taken apart, and put together again by a forger who knows the format: the digests
are right. Written here anew, so that the package is not compared with itself."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}


@dataclass
class Stored:
    """One tensor as it stands in a file."""

    dtype: str
    shape: list[int]
    raw: bytes


@dataclass
class Parts:
    """What a file consists of; one member for a concept file, all of them for a set.

    Attributes:
        tensors: by key; in a set with the concept's name before it.
        documents: of each concept, with its weight in a set.
        rest: what else stands in a set's document.
        others: metadata for other tools.
    """

    tensors: dict[str, Stored]
    documents: list[dict[str, Any]]
    weights: list[float] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def taken_apart(content: bytes) -> Parts:
    """The parts of a valid file."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = {
        key: Stored(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }
    if "sbora" in metadata:
        return Parts(tensors, [json.loads(metadata.pop("sbora"))], others=metadata)
    rest = json.loads(metadata.pop("sbora_set"))
    entries = rest.pop("concepts")
    documents, weights = [e["document"] for e in entries], [e["weight"] for e in entries]
    return Parts(tensors, documents, weights, rest, metadata)


def put_together(parts: Parts) -> bytes:
    """A file with right digests, whatever it says."""
    documents = [_sealed(document, _own(parts, document)) for document in parts.documents]
    if not parts.weights:
        return _file(parts.tensors, {"sbora": canonical(documents[0]), **parts.others})
    entries = [
        {"weight": weight, "document": document}
        for weight, document in zip(parts.weights, documents, strict=True)
    ]
    entries.sort(key=lambda entry: entry["document"]["digest"])
    whole = {**parts.rest, "concepts": entries}
    whole.pop("digest", None)
    whole["digest"] = hashlib.sha256(canonical(whole).encode()).hexdigest()
    return _file(parts.tensors, {"sbora_set": canonical(whole), **parts.others})


def canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _own(parts: Parts, document: dict[str, Any]) -> dict[str, Stored]:
    if not parts.weights:
        return parts.tensors
    prefix = f"{document.get('name')}:"
    return {
        key.removeprefix(prefix): stored
        for key, stored in parts.tensors.items()
        if key.startswith(prefix)
    }


def _sealed(document: dict[str, Any], tensors: dict[str, Stored]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        stored = tensors[key]
        shape = ",".join(map(str, stored.shape))
        digest.update(f"{key}\0{stored.dtype}\0{shape}\0".encode("utf-8", "surrogatepass"))
        digest.update(stored.raw)
    bare = {key: value for key, value in document.items() if key != "digest"}
    digest.update(canonical(bare).encode())
    return {**bare, "digest": digest.hexdigest()}


def _file(tensors: dict[str, Stored], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    payload, offset = [], 0
    for key, stored in tensors.items():
        end = offset + len(stored.raw)
        header[key] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, end]}
        payload.append(stored.raw)
        offset = end
    return with_header(json.dumps(header).encode(), b"".join(payload))


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def zeros(dtype: str, shape: list[int]) -> Stored:
    return Stored(dtype, shape, bytes(SIZES[dtype] * math.prod(shape)))
