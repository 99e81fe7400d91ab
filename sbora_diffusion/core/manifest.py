"""Manifests: sizes and SHA-256 of the files of a folder, with a digest of the manifest itself."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbora_diffusion.core.errors import IntegrityError
from sbora_diffusion.core.folders import settle
from sbora_diffusion.core.storage import canonical_json, strict_json, write_durably

MANIFEST = "manifest.json"
REMEDY = "delete that checkpoint, or start anew without --resume"

Entry = dict[str, Any]
"""`size` and `sha256` of one file."""


def entry_of(data: bytes) -> Entry:
    """The entry of a file with these bytes."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def manifest_text(entries: Mapping[str, Entry], version: Any) -> str:
    """The manifest of files, by their names."""
    body = {"files": dict(entries), "format": version}
    digest = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    return canonical_json({**body, "sha256": digest})


def read_manifest(path: Path) -> tuple[dict[str, Entry], Any]:
    """The entries of a manifest, and the format that it names.

    Raises:
        IntegrityError: it is missing or not whole.
    """
    try:
        text = path.read_text(encoding="ascii")
        found = strict_json(text)
        files, version = found["files"], found["format"]
        whole = text == manifest_text(files, version)
    except FileNotFoundError as error:
        raise damaged(path, "missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, "damaged") from error
    if not whole:
        raise damaged(path, "damaged")
    return files, version


def verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise IntegrityError unless a file is the one of an entry."""
    try:
        found = _read_entry(path)
    except FileNotFoundError as error:
        raise damaged(path, "missing") from error
    except OSError as error:
        raise damaged(path, f"unreadable ({error.strerror})") from error
    if found["size"] != entry["size"]:
        raise damaged(path, f"cut off or extended: {entry['size']} bytes, found {found['size']}")
    if found != entry:
        raise damaged(path, f"changed: SHA-256 {entry['sha256'][:12]}… does not hold")


def seal_folder(folder: Path, version: Any) -> None:
    """Force a folder of files to the disk and add their manifest; it replaces an older one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    settle(folder)
    entries = {path.name: _read_entry(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_durably(folder / MANIFEST, manifest_text(entries, version).encode())


def check_folder(folder: Path) -> None:
    """Read a sealed folder completely.

    Raises:
        IntegrityError: names the file that is missing, cut off, changed or not in the manifest.
    """
    files, _ = read_manifest(folder / MANIFEST)
    unknown = {p.name for p in folder.iterdir() if p.is_file()} - files.keys() - {MANIFEST}
    if unknown:
        raise damaged(folder / min(unknown), "not in the manifest")
    for name, entry in files.items():
        verify_file(folder / name, entry)


def damaged(path: Path, how: str) -> IntegrityError:
    """The error about one file."""
    return IntegrityError(f"{path} is {how}", REMEDY)


def _read_entry(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}
