"""Pictures of the study in a tar file, without loss, with the facts about how they were drawn."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

FACTS = "drawn.json"
SHARED = ("settings", "concepts", "threes", "unrelated")  # the same in every part


@dataclass
class Archive:
    """Groups of pictures by name, e.g. "single/plushbear".

    Attributes:
        facts: ready for JSON.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[Image.Image]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Equal content gives an equal file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            text = json.dumps(self.facts, indent=1, ensure_ascii=False)
            _add(tar, FACTS, text.encode("utf-8"))
            for name, pictures in self.groups.items():
                for number, picture in enumerate(pictures):
                    _add(tar, f"{name}/{number:02}.webp", _webp(picture))


def read_archives(folder: Path) -> Archive:
    """All parts in a folder as one; their runs, routing and times are lists or tables of all."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise SystemExit(f"{folder} has no .tar files")
    parts = [_read(path) for path in paths]
    first = parts[0].facts
    for path, part in zip(paths, parts, strict=True):
        if differ := [key for key in SHARED if part.facts[key] != first[key]]:
            raise SystemExit(f"{path} and {paths[0]} differ in {differ}: draw all parts alike")
    return Archive(_joined([part.facts for part in parts]), _all_groups(parts))


def _joined(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    routing = {name: found for part in facts for name, found in part["routing"].items()}
    if missing := facts[0]["concepts"].keys() - routing.keys():
        raise SystemExit(f"the part with {sorted(missing)} is missing")
    return {
        **{key: facts[0][key] for key in SHARED},
        "routing": routing,
        "merge_seconds": [entry for part in facts for entry in part["merge_seconds"]],
        "runs": [part["run"] for part in facts],
    }


def _all_groups(parts: Sequence[Archive]) -> dict[str, list[Image.Image]]:
    groups: dict[str, list[Image.Image]] = {}
    for part in parts:
        if twice := groups.keys() & part.groups.keys():
            raise SystemExit(f"two parts have the pictures {sorted(twice)}")
        groups |= part.groups
    return groups


def _read(path: Path) -> Archive:
    archive = Archive()
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            assert content, member.name
            if member.name == FACTS:
                archive.facts = json.load(content)
            else:
                group = member.name.rpartition("/")[0]
                picture = Image.open(io.BytesIO(content.read())).convert("RGB")
                archive.groups.setdefault(group, []).append(picture)
    return archive


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
