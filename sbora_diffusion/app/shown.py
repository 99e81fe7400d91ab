"""Commands and paths as the page shows them: short, and free of this machine's folders."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sbora_diffusion.library import default_path


def shown_path(path: Path | str) -> str:
    """Relative to the working folder, else to the home folder, else in full."""
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder):
            return prefix + str(Path(path).relative_to(folder))
    return str(path)


def shown_command(words: Sequence[str]) -> str:
    """A command as a person would type it; the usual library goes without saying."""
    usual = ["--library", str(default_path().absolute())]
    kept = list(words)
    for k in range(len(kept) - 1):
        if kept[k : k + 2] == usual:
            del kept[k : k + 2]
            break
    return " ".join(_quoted(shown_path(word) if word.startswith("/") else word) for word in kept)


def _quoted(word: str) -> str:
    """For a shell, which reads ~ only where nothing quotes it."""
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)
