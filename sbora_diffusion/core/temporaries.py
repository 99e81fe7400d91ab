"""Names for files and folders that are not finished, and the end of those that a killed process
left: a name says which process of which machine makes what.
"""

import hashlib
import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"\.sbora-([1-9]\d{0,8})-(.*)")  # the process; what it makes, and a random end


def temporary_beside(path: Path) -> Path:
    """A new name beside `path` for what is to become it; what was left of it there is removed.

    Its length does not depend on that of `path`, whose name may be as long as a name can be.
    """
    # With the machine: the processes of another one that shares the folder cannot be asked for.
    of = hashlib.sha256(f"{platform.node()}\0".encode() + os.fsencode(path.name)).hexdigest()[:16]
    sweep(path.parent, of)
    return path.parent / f".sbora-{os.getpid()}-{of}-{secrets.token_hex(8)}"


def sweep(folder: Path, of: str = "") -> None:
    """Remove what processes that are gone left unfinished.

    Args:
        of: only what was to become this, as `temporary_beside` writes it.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        made = _NAME.fullmatch(entry.name)
        if made and made[2].startswith(of) and not _runs(int(made[1])):
            discard(entry)


def discard(entry: Path) -> None:
    """Remove a file or a folder, or as much of it as can be removed."""
    with suppress(OSError, ValueError):  # ValueError: a name with a NUL
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _runs(process: int) -> bool:
    """Whether a process is there; where that cannot be asked, it is."""
    if os.name != "posix":  # there signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
