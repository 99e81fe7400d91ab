"""Checkpoints: folders that appear whole, and are read only if every byte is what was written.

A checkpoint is a folder with `state.json`, a `.safetensors` file for each table of tensors, and
`manifest.json` with the size and SHA-256 of each of them and its own digest. It is made under a
temporary name: files are written, the manifest last, all are forced to the disk, then the folder
gets its name in one rename. A process that is killed at any point leaves the checkpoints before it.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbora_diffusion.core.errors import FormatError, IntegrityError, NonFiniteError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.manifest import (
    MANIFEST,
    REMEDY,
    Entry,
    entry_of,
    manifest_text,
    read_manifest,
    verify_file,
)
from sbora_diffusion.core.storage import canonical_json, decode, encode, strict_json
from sbora_diffusion.core.temporaries import discard, sweep, temporary_beside

FORMAT = 1
KEPT = 2
STATE = "state.json"

_NAME = re.compile(r"\d{6,}_step_\d+")
_FILE = re.compile(r"[a-z]+\.(json|safetensors)")


class Content(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        document: as JSON can hold it.
        tensors: table → name → fp32, fp16, bf16 or int32 of one to four dimensions, none empty.
    """

    document: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class CheckpointFolder:
    """The checkpoints of one piece of work, the newest `KEPT` of them.

    Those that another process left are kept until this one has written one of its own, or has read
    one: what it goes on from counts as its own.

    Args:
        root: the folder that they lie in; it is made when the first is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._own: list[Path] = []

    def paths(self) -> list[Path]:
        """The checkpoints in the order in which they were written, whole or damaged."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_number)

    def write(self, step: int, content: Content) -> Path:
        """Add a checkpoint, then drop those before the newest.

        Raises:
            NonFiniteError: a tensor is not finite; nothing is written.
            ResourceError: it cannot be written; the older ones are untouched.
        """
        files = _encoded(content)
        before = self.paths()
        number = _number(before[-1]) + 1 if before else 1
        path = self.root / f"{number:06d}_step_{step}"
        write_folder(path, partial(_fill, files))
        self._own = [*self._own, path][-KEPT:]
        for old in before:
            if old not in self._own:
                self._drop(old)
        return path

    def newest(self, tell: Callable[[str], None]) -> Content | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Args:
            tell: is told what is wrong with each newer one.

        Raises:
            IntegrityError: none is whole; names the first file at fault in the newest.
            FormatError: it was written by a version with another format.
        """
        first: IntegrityError | None = None
        for path in reversed(self.paths()):
            try:
                content = read_checkpoint(path)
            except IntegrityError as error:
                tell(f"{error.problem}; the checkpoint before it is looked at")
                first = first or error
                continue
            self._own = [path]
            return content
        if first:
            raise first
        return None

    def sweep(self) -> None:
        """Remove what processes that are gone left half-written."""
        sweep(self.root)

    def remove(self) -> None:
        """Remove all checkpoints, and the folder if nothing else is in it."""
        for path in self.paths():
            self._drop(path)
        self.sweep()
        with suppress(OSError):
            self.root.rmdir()

    def _drop(self, path: Path) -> None:
        """Under a temporary name first: no half of it is ever read."""
        doomed = temporary_beside(path)
        with suppress(OSError):
            path.replace(doomed)
        discard(doomed)


def read_checkpoint(path: Path) -> Content:
    """Read one checkpoint completely.

    Raises:
        IntegrityError: names the file that is missing, cut off or changed.
        FormatError: its format is another version's.
    """
    files = _manifest(path / MANIFEST)
    for name, entry in files.items():
        verify_file(path / name, entry)
    document = strict_json((path / STATE).read_text(encoding="utf-8"))
    tables = sorted(name for name in files if name != STATE)
    return Content(document, {name.partition(".")[0]: decode(path / name)[0] for name in tables})


def _encoded(content: Content) -> dict[str, bytes]:
    """File name → bytes, the manifest last."""
    files = {STATE: canonical_json(content.document).encode()}
    for table, tensors in content.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{table} {name} is not finite and is not saved", "lower the rates"
                )
        files[f"{table}.safetensors"] = encode(tensors, {})
    entries = {name: entry_of(data) for name, data in files.items()}
    files[MANIFEST] = manifest_text(entries, FORMAT).encode()
    return files


def _fill(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        with open(folder / name, "xb") as file:
            file.write(data)


def _manifest(path: Path) -> dict[str, Entry]:
    files, version = read_manifest(path)
    if version != FORMAT or STATE not in files or not all(map(_FILE.fullmatch, files)):
        raise FormatError(f"{path} has format {version!r}, {FORMAT} is read", REMEDY)
    return files


def _number(path: Path) -> int:
    return int(path.name.partition("_")[0])
