"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sbora_diffusion.core.errors import ConflictError, ResourceError
from sbora_diffusion.core.storage import sync_folder

TEMPORARY = ".sbora-{}-"
"""What unfinished folders are called: with the number of the process that makes them."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whose content `fill` writes, all of it or nothing; its mode follows the umask.

    Names are forced to the disk, those in the folder before its own; bytes are `fill`'s affair.

    Raises:
        ConflictError: the folder exists and is not empty.
        ResourceError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} exists and is not empty", "give another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=TEMPORARY.format(os.getpid()), dir=folder.parent))
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        fill(unfinished)
        unfinished.chmod(0o777 & ~_umask())
        sync_folder(unfinished)
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(f"{folder} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
