"""Folders that appear whole or not at all."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sbora_diffusion.core.errors import ConflictError, ResourceError
from sbora_diffusion.core.storage import sync_folder
from sbora_diffusion.core.temporaries import discard, temporary_beside

_REMEDY = "make room there, or choose another folder"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whose content `fill` writes, all of it or nothing; its mode follows the umask.

    All is forced to the disk, what is in the folder before its own name.

    Raises:
        ConflictError: the folder exists and is not empty.
        ResourceError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} exists and is not empty", "give another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = temporary_beside(folder)
        unfinished.mkdir()  # tempfile's would be 0700 whatever the umask
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror}", _REMEDY) from error
    try:
        fill(unfinished)
        settle(unfinished)
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(f"{folder} cannot be written: {reason}", _REMEDY) from error
    finally:
        discard(unfinished)


def settle(folder: Path) -> None:
    """Force all files to the disk, with the mode that the umask gives; the safetensors library
    leaves 0600."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
