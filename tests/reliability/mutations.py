"""Ways to spoil a concept file: its bytes, its header, its document, its tensors."""

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.reliability.forging import Parts, Stored, put_together, taken_apart, with_header, zeros


@dataclass(frozen=True)
class Mutant:
    """A spoilt file.

    Attributes:
        forged: its digests are right, so it is another file rather than a damaged one.
        wrong: it contradicts the format, and must be refused.
    """

    kind: str
    content: bytes
    forged: bool = False
    wrong: bool = False


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 4, 5, 8, 1 << 31, 1 << 63, 1 << 64, 1 << 70, -(1 << 70)),
    *(
        0.0,
        -0.0,
        0.5,
        1e-300,
        1e300,
        4.0,
        "",
        "4",
        "0",
        "fa",
        "fb",
        "a" * 300,
        "../x",
        "/x",
        "x\0y",
    ),
    *("\ud800", "<robot>", "<a b>", "0" * 48, "0" * 64, [], [[]], [1, 2, 3], [24, 16, 16], {}),
    *({"a": 1}, {"token": "<robot>", "initializer": ""}, [{"token": "<x>", "initializer": "x"}]),
]
NUMBERS = [
    -(1 << 63),
    -1,
    0,
    1,
    2,
    3,
    7,
    16,
    255,
    1 << 20,
    1 << 31,
    (1 << 53) + 1,
    1 << 63,
    1 << 64,
]
KEYS = ["", "a", "unet.x.factor", "x.lora_A.weight", "text_encoder.<robot>", "__metadata__", "a\0b"]


def mutant(rng: random.Random, seeds: list[bytes]) -> Mutant:
    """One spoilt file; the same random state gives the same one."""
    seed = rng.choice(seeds)
    kind = rng.choice(KINDS)
    return KINDS_BY_NAME[kind](rng, seed, kind)


# ---- bytes


def _flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, content: bytearray) -> None:
    at, size = rng.randrange(len(content)), rng.randint(1, 64)
    content[at : at + size] = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))


def _cut(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 4, 8, 100, len(content)))]


def _insert(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))


def _repeat(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    content[at:at] = content[at : at + rng.choice((1, 4, 64, 500))]


def _exchange(rng: random.Random, content: bytearray) -> None:
    size = rng.choice((1, 4, 16))
    a, b = (rng.randrange(len(content) - size) for _ in range(2))
    one, other = bytes(content[a : a + size]), bytes(content[b : b + size])
    content[a : a + size] = other
    content[b : b + size] = one


def _header_length(rng: random.Random, content: bytearray) -> None:
    old = int.from_bytes(content[:8], "little")
    new = rng.choice((0, 1, old - 8, old + 8, old + 1, 100 << 20, 1 << 40, (1 << 64) - 1))
    content[:8] = new.to_bytes(8, "little")


def _tail(rng: random.Random, content: bytearray) -> None:
    content += rng.choice((b"PK\x03\x04" + bytes(40), b"\x80\x04.", bytes(8), rng.randbytes(64)))


BYTES = (_flip, _overwrite, _cut, _insert, _repeat, _exchange, _header_length, _tail)


def _of_bytes(action: Callable[[random.Random, bytearray], None]):
    def spoil(rng: random.Random, seed: bytes, kind: str) -> Mutant:
        content = bytearray(seed)
        action(rng, content)
        return Mutant(kind, bytes(content))

    return spoil


# ---- the header as JSON; the payload stays


def _header_value(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([key for key in header if key != "__metadata__"])
    field = rng.choice(("dtype", "shape", "data_offsets"))
    entry = header[name]
    if field == "dtype":
        entry["dtype"] = rng.choice(["F64", "F8_E4M3", "BOOL", "I64", "U8", "f32", "", *JUNK])
    elif rng.random() < 0.3:
        entry[field] = rng.choice(JUNK)
    else:
        entry[field][rng.randrange(len(entry[field]))] = rng.choice(NUMBERS)


def _header_key(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(list(header))
    action = rng.choice(("drop", "rename", "copy", "metadata", "extra"))
    if action == "drop":
        del header[name]
    elif action == "rename":
        header[rng.choice([*KEYS, name.swapcase(), f"{name}x"])] = header.pop(name)
    elif action == "copy":
        header[rng.choice(KEYS)] = header[name]
    elif action == "metadata":
        header["__metadata__"] = rng.choice([*JUNK, {"sbora": rng.choice(JUNK)}])
    else:
        header[name] = {**header[name], "surprise": rng.choice(JUNK)}


def _of_header(action: Callable[[random.Random, dict[str, Any]], None]):
    def spoil(rng: random.Random, seed: bytes, kind: str) -> Mutant:
        header, data = _split(seed)
        action(rng, header)
        return Mutant(kind, with_header(json.dumps(header).encode(), data))

    return spoil


def _duplicate_key(rng: random.Random, seed: bytes, kind: str) -> Mutant:
    header, data = _split(seed)
    name = rng.choice(list(header))
    twice = rng.choice((header[name], rng.choice(JUNK), header[rng.choice(list(header))]))
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(twice)}}}"
    return Mutant(kind, with_header(text.encode(), data), wrong=True)


def _deep(rng: random.Random, seed: bytes, kind: str) -> Mutant:
    header, data = _split(seed)
    depth, (opening, closing) = (
        rng.choice((900, 5_000, 200_000)),
        rng.choice(("[]", ('{"a":', "}"))),
    )
    nested = opening * depth + ("0" if closing == "}" else "") + closing * depth
    if rng.random() < 0.5:
        text = json.dumps(header)[:-1] + f', "deep": {nested}}}'
    else:
        key = "sbora" if "sbora" in header["__metadata__"] else "sbora_set"
        header["__metadata__"][key] = header["__metadata__"][key][:-1] + f',"deep":{nested}}}'
        text = json.dumps(header)
    return Mutant(kind, with_header(text.encode(), data), wrong=True)


def _no_json(rng: random.Random, seed: bytes, kind: str) -> Mutant:
    header, data = _split(seed)
    bad = rng.choice(("NaN", "Infinity", "-Infinity", "9" * 5000, "1e999", "'a'", "0x10", "[1,]"))
    return Mutant(
        kind, with_header(f'{json.dumps(header)[:-1]}, "a": {bad}}}'.encode(), data), wrong=True
    )


def _spelling(rng: random.Random, seed: bytes, kind: str) -> Mutant:
    """The same file in other words: spaces, order, escapes; it may be read, as the same concept."""
    header, data = _split(seed)
    keys = rng.sample(list(header), len(header))
    text = json.dumps({key: header[key] for key in keys}, indent=rng.choice((None, 1)))
    return Mutant(kind, with_header(text.encode() + b" " * rng.randrange(9), data))


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# ---- forgeries: tensors and documents with right digests


def _chosen(rng: random.Random, parts: Parts, suffix: str) -> Stored:
    return parts.tensors[rng.choice(sorted(key for key in parts.tensors if key.endswith(suffix)))]


def _indices(rng: random.Random, parts: Parts) -> None:
    stored = _chosen(rng, parts, ".indices")
    values = list(struct.unpack(f"<{stored.shape[0]}i", stored.raw))
    at = rng.randrange(len(values))
    action = rng.choice(("negative", "twice", "beyond", "order", "other"))
    if action == "negative":
        values[at] = -rng.choice((1, 2, 1 << 20, (1 << 31)))
    elif action == "twice":
        values[at] = values[at - 1]
    elif action == "beyond":
        values[at] = rng.choice((24, 25, 1 << 20, (1 << 31) - 1))
    elif action == "order":
        values.reverse()
    else:
        values[at] = rng.choice([k for k in range(16) if k not in values])
    stored.raw = struct.pack(f"<{len(values)}i", *values)


def _factor(rng: random.Random, parts: Parts) -> None:
    stored = _chosen(rng, parts, rng.choice((".factor", ">")))
    action = rng.choice(("nan", "inf", "int", "flat", "deep", "empty"))
    if action in ("nan", "inf"):
        at = 4 * rng.randrange(len(stored.raw) // 4)
        bad = struct.pack("<f", float(action) * rng.choice((1, -1)))
        stored.raw = stored.raw[:at] + bad + stored.raw[at + 4 :]
    elif action == "int":
        stored.dtype = "I32"
    elif action == "empty":
        stored.shape, stored.raw = [0, *stored.shape[1:]], b""
    else:
        size = len(stored.raw) // 4
        stored.shape = [size] if action == "flat" else [1, *stored.shape]


def _rank(rng: random.Random, parts: Parts) -> None:
    """Factors, indices or the document of another rank than the rest."""
    stored = _chosen(rng, parts, rng.choice((".factor", ".indices")))
    rank = rng.choice((1, 2, 3, 5, 8, 16))
    stored.shape = [rank if side == 4 else side for side in stored.shape]
    replacement = zeros(stored.dtype, stored.shape)
    stored.raw = replacement.raw


def _tensor_name(rng: random.Random, parts: Parts) -> None:
    key = rng.choice(sorted(parts.tensors))
    action = rng.choice(("missing", "extra", "misnamed"))
    if action == "missing":
        del parts.tensors[key]
    elif action == "extra":
        parts.tensors[rng.choice([*KEYS[:4], f"{key}.weight", f"{key}s"])] = zeros("F32", [2])
    else:
        parts.tensors[rng.choice([key + "x", key[1:], key.replace(".", "..", 1)])] = (
            parts.tensors.pop(key)
        )


def _document_value(rng: random.Random, parts: Parts) -> None:
    document = rng.choice(parts.documents)
    document[rng.choice([*document, "surprise"])] = copy.deepcopy(rng.choice(JUNK))


def _document_key(rng: random.Random, parts: Parts) -> None:
    document = rng.choice(parts.documents)
    del document[rng.choice([key for key in document if key != "name"])]


def _document_number(rng: random.Random, parts: Parts) -> None:
    document = rng.choice(parts.documents)
    name = rng.choice(("rank", "slot", "start", "stop", "allocation_seed", "format_version"))
    document[name] = rng.choice([n for n in NUMBERS if n != document[name]])


def _set_document(rng: random.Random, parts: Parts) -> None:
    if not parts.weights:
        return _document_value(rng, parts)
    if rng.random() < 0.5:
        parts.rest[rng.choice([*parts.rest, "surprise"])] = rng.choice(JUNK)
    else:
        parts.weights[rng.randrange(len(parts.weights))] = rng.choice(JUNK)
    return None


def _forged(action: Callable[[random.Random, Parts], None], wrong: bool):
    def spoil(rng: random.Random, seed: bytes, kind: str) -> Mutant:
        parts = taken_apart(seed)
        action(rng, parts)
        return Mutant(kind, put_together(parts), True, wrong)

    return spoil


KINDS_BY_NAME: dict[str, Callable[[random.Random, bytes, str], Mutant]] = {
    **{f"bytes{action.__name__}": _of_bytes(action) for action in BYTES},
    "header_value": _of_header(_header_value),
    "header_key": _of_header(_header_key),
    "header_duplicate_key": _duplicate_key,
    "header_deep": _deep,
    "header_no_json": _no_json,
    "header_spelling": _spelling,
    "forged_indices": _forged(_indices, True),
    "forged_factor": _forged(_factor, True),
    "forged_rank": _forged(_rank, True),
    "forged_tensor_name": _forged(_tensor_name, True),
    "forged_document_value": _forged(_document_value, False),
    "forged_document_key": _forged(_document_key, False),
    "forged_document_number": _forged(_document_number, False),
    "forged_set_document": _forged(_set_document, False),
}
KINDS = list(KINDS_BY_NAME)
