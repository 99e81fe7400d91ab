"""Records that grow line by line: JSON Lines that several processes write, each its own file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbora_diffusion.core.errors import ConflictError, FormatError
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.outputs import check_writable, make_parent

Line = Mapping[str, Any]
Key = tuple[Any, ...]
KEYS = ("preset", "method", "merge", "trial", "seed", "concept")
"""What tells the lines of one record apart; a key that a record does not have counts as None."""
_DEFAULTS = TrainConfig.model_validate({}).model_dump(mode="json")


def key_of(line: Line) -> Key:
    """What a line is about."""
    return tuple(line.get(key) for key in KEYS)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines of a folder's files, by the files' names; a half-written last line is left out.

    Raises:
        FormatError: another line is not a line of a record.
    """
    return [line for file in sorted(folder.glob("*.jsonl")) for line in _lines(file)]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [_parsed(text, file, k) for k, text in enumerate(_whole(file).split("\n")[:-1], 1)]


def _whole(file: Path) -> str:
    """A file up to the end of its last whole line."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1]


def _parsed(text: str, file: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not {"preset", "method", "concept", "setting"} <= line.keys():
        raise FormatError(
            f"line {number} of {file} is no line of a record", "move the file away or mend it"
        )
    return line


class Record:
    """One process's share of a record, and what all of them have written so far.

    Args:
        folder: of all files.
        name: of this process's file, without a suffix.

    Raises:
        FormatError: see `read_lines`.
        ConfigError, ResourceError: the file cannot be written.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.file = folder, folder / f"{name}.jsonl"
        check_writable(self.file)
        self._known = {key_of(line): line for line in reversed(read_lines(folder))}

    def find(self, about: Line) -> Line | None:
        """The line about this, if there is one.

        Args:
            about: has the keys and the setting of a line.

        Raises:
            ConflictError: there is one, of another setting: other figures would stand beside it.
        """
        found = self._known.get(key_of(about))
        if found is not None and (then := read_today(found["setting"])) != about["setting"]:
            raise ConflictError(
                f"{self.folder} has {'/'.join(str(k) for k in key_of(about) if k is not None)} of "
                f"another setting: {difference(then, about['setting'])}",
                "give another --out, or move the old record away",
            )
        return found

    def add(self, line: Line) -> None:
        """Append a line, and forget what an interruption left after the last whole one."""
        make_parent(self.file)
        if self.file.exists():
            whole = len(_whole(self.file).encode())
            if whole < self.file.stat().st_size:
                with self.file.open("r+b") as opened:
                    opened.truncate(whole)
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._known[key_of(line)] = line


def read_today(setting: Line) -> Line:
    """A line's setting, with the defaults of what recipes could not say when it was written."""
    recipe = setting.get("config")
    return setting if recipe is None else {**setting, "config": {**_DEFAULTS, **recipe}}


def difference(old: Line, new: Line, path: str = "") -> str:
    """The first setting in which two differ: "drawing.steps was 20, is 30"."""
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key), new.get(key)
        if was != now:
            place = f"{path}.{key}" if path else str(key)
            if isinstance(was, Mapping) and isinstance(now, Mapping):
                return difference(was, now, place)
            return f"{place} was {was!r}, is {now!r}"
    raise AssertionError("they do not differ")


def unique(lines: Iterable[Line]) -> list[Line]:
    """Lines without repetitions, which processes leave that were split anew; the first counts."""
    found: dict[Key, Line] = {}
    for line in lines:
        found.setdefault(key_of(line), line)
    return list(found.values())
