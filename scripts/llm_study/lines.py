"""The study's record: JSON Lines that several processes write, each its own file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = ("kind", "group", "method", "rank", "quantize", "seed", "rate")

Line = dict[str, Any]


def read_lines(folder: Path) -> dict[tuple[Any, ...], Line]:
    """What is recorded, by what it is about; a half-written last line is left out."""
    return {key_of(line): line for file in sorted(folder.glob("*.jsonl")) for line in _lines(file)}


def key_of(line: Line) -> tuple[Any, ...]:
    return tuple(line[key] for key in KEY)


def append(file: Path, line: Line) -> None:
    """Add a line, on one of its own whatever an interruption left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_bytes() if file.exists() else b""
    start = "" if not before or before.endswith(b"\n") else "\n"
    with file.open("a", encoding="utf-8") as opened:
        opened.write(start + json.dumps(line, separators=(",", ":")) + "\n")


def _lines(file: Path) -> Iterator[Line]:
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        yield line
