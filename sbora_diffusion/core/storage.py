"""Tensors in `.safetensors` files, strictly: one content has one sequence of bytes, and a file is
read only if all of it is accounted for. Nothing here can run code from a file.

The layout is the published one (https://huggingface.co/docs/safetensors): 8 bytes of header length,
little-endian; a JSON header padded with spaces to 8 bytes; the tensors without holes. It is written
here and not by the safetensors library because the library orders the metadata by a hash map.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.core.temporaries import discard, temporary_beside

MAX_FILE = 2 << 30
MAX_HEADER = 4 << 20

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_REMEDY = "give a concept file written by `sbora train`"


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a `.safetensors` file, a function of the content alone.

    Args:
        tensors: fp32, fp16, bf16 or int32, on any device.
        metadata: strings shown by other tools.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    payload, offset = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        raw = raw_bytes(tensors[name])
        header[name] = {
            "dtype": dtype_name(tensors[name].dtype),
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        payload.append(raw)
        offset += len(raw)
    text = canonical_json(header, sort=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *payload])


def decode(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a `.safetensors` file completely, on the CPU.

    Raises:
        FormatError: not a regular file, too large, or not exactly what its header says.
        ResourceError: the file cannot be opened.
    """
    try:
        size = _regular_size(path)
        with path.open("rb") as file:
            header = _read_header(path, file, size)
            metadata = _metadata(path, header)
            entries = _entries(path, header, size - file.tell())
            tensors = {name: _read_tensor(path, file, *entries[name]) for name in entries}
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be read: {error.strerror}", "check its permissions"
        ) from error
    return tensors, metadata


def write_atomically(path: Path, data: bytes, overwrite: bool = True) -> None:
    """Write a file completely or not at all; its mode follows the umask.

    The bytes go to a temporary file in the same folder, are forced to the disk, and take the name
    in one rename, which is forced to the disk too. What a killed process left of an earlier attempt
    is removed.

    Raises:
        ConfigError: the file exists and must not be overwritten.
        ResourceError: the folder is missing or not writable, or the disk is full.
    """
    if not overwrite and os.path.lexists(path):
        raise ConfigError(f"{path} exists already", "choose another name or allow overwriting")
    with written_together([(path, data)]):
        pass


@contextmanager
def written_together(files: Iterable[tuple[Path, bytes]]) -> Iterator[None]:
    """Write files that get their names, all of them, when the block ends well.

    Raises:
        ResourceError: see `write_atomically`.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in files:
            with _refused_writing(path):
                staged.append((temporary_beside(path), path))
                write_durably(staged[-1][0], data)
        yield
        for temporary, path in staged:
            with _refused_writing(path):
                os.replace(temporary, path)
                sync_folder(path.parent)
    finally:
        for temporary, _ in staged:
            discard(temporary)


@contextmanager
def _refused_writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise ResourceError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}",
            "choose a folder that exists and is writable, with space left",
        ) from error


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(document: Any, sort: bool = True) -> str:
    """Compact JSON in ASCII; refuses NaN, infinity and too deep nesting with a ValueError."""
    try:
        return json.dumps(document, sort_keys=sort, separators=(",", ":"), allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def strict_json(text: str) -> Any:
    """Parse JSON, refusing with a ValueError what `json` lets pass: duplicate keys, NaN, depth."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values as they stand in a file: row-major, little-endian."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the header."""
    if dtype not in _NAMES:
        raise FormatError(f"tensors of {dtype} cannot be stored", f"use one of {sorted(DTYPES)}")
    return _NAMES[dtype]


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk; its mode follows the umask.

    Raises:
        OSError: it exists, or cannot be written.
    """
    # os.open lets the kernel apply the umask, which tempfile's 0600 would not.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _regular_size(path: Path) -> int:
    if not path.exists():
        raise FormatError(f"{path} does not exist", "check the path")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file", _REMEDY)
    if status.st_size > MAX_FILE:
        raise FormatError(f"{path} has {status.st_size} bytes, at most {MAX_FILE} allowed", _REMEDY)
    return status.st_size


def _read_header(path: Path, file: BufferedReader, size: int) -> dict[str, Any]:
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length > min(MAX_HEADER, size - 8):
        raise FormatError(f"{path} is not a safetensors file{_looks_like(start)}", _REMEDY)
    try:
        header = strict_json((start[8:] + file.read(length - 1)).decode())
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise FormatError(f"the header of {path} is damaged: {reason}", _REMEDY) from error
    return header


def _looks_like(start: bytes) -> str:
    if start.startswith(b"PK"):
        return " but a zip archive or PyTorch checkpoint, which could run code and is never opened"
    if re.match(rb"\x80[\x02-\x05]", start):
        return " but a Python pickle, which could run code and is never opened"
    return ""


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"the metadata of {path} is not a table of strings", _REMEDY)
    return metadata


def _entries(path: Path, header: dict[str, Any], data: int) -> dict[str, tuple[str, list[int]]]:
    """Name to (dtype, shape) in the order of the data, once that is known to have no holes."""
    spans = {}
    for name, entry in header.items():
        if not _is_entry(entry):
            raise FormatError(f"tensor {name[:200]!r} in {path} is described wrongly", _REMEDY)
        spans[name] = entry["data_offsets"]
    ordered = sorted(spans, key=lambda name: spans[name])
    position = 0
    for name in ordered:
        if spans[name] != [position, position + _nbytes(header[name])]:
            raise FormatError(f"tensor {name[:200]!r} in {path} is misplaced or cut off", _REMEDY)
        position = spans[name][1]
    if position != data:
        raise FormatError(f"{path} holds {data} bytes of data, its header says {position}", _REMEDY)
    return {name: (header[name]["dtype"], header[name]["shape"]) for name in ordered}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and entry["dtype"] in DTYPES
        and _are_counts(entry["shape"], 1)
        and 1 <= len(entry["shape"]) <= 4
        and _are_counts(entry["data_offsets"], 0)
        and len(entry["data_offsets"]) == 2
    )


def _are_counts(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and least <= value <= MAX_FILE for value in values
    )


def _nbytes(entry: dict[str, Any]) -> int:
    count = DTYPES[entry["dtype"]].itemsize
    for side in entry["shape"]:
        count *= side
    return count


def _read_tensor(path: Path, file: BufferedReader, dtype: str, shape: list[int]) -> torch.Tensor:
    buffer = bytearray(_nbytes({"dtype": dtype, "shape": shape}))
    if file.readinto(buffer) != len(buffer):
        raise FormatError(f"{path} was cut off while it was read", "try again")
    return torch.frombuffer(buffer, dtype=DTYPES[dtype]).reshape(shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
