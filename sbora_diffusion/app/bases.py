"""The base models that the page offers, and the one that a person has chosen."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.storage import write_atomically

if TYPE_CHECKING:
    from sbora_diffusion.app.engine import Engine

FOLDER = "bases"
"""Beside the app's other folders: model folders and checkpoints in it are offered."""


@dataclass(frozen=True)
class ChosenBase:
    """A base that was loaded once, so that much is known of it.

    Attributes:
        name: what the page calls it.
        reference: what commands call it.
        key: what the library calls it.
        resolution: pixels a side of its usual pictures.
    """

    name: str = "pocket"
    reference: str = "pocket"
    key: str = "pocket"
    resolution: int = 128

    @property
    def is_pocket(self) -> bool:
        return self.reference == "pocket"

    @property
    def option(self) -> list[str]:
        """Words of a command that name it."""
        return [] if self.is_pocket else ["--base", self.reference]

    @property
    def sizes(self) -> list[str]:
        """Pictures' sizes to choose from: usual, wide, tall and large."""
        side, more = self.resolution, self.resolution * 3 // 2
        pairs = ((side, side), (more, side), (side, more), (more, more))
        return [f"{width} × {height}" for width, height in pairs]


POCKET = ChosenBase()


def found_bases(home: Path) -> dict[str, str]:
    """Name → reference of every base on this machine: pocket, what lies in the folder `bases`, and
    what was fetched from the hub before."""
    own = {path.name: str(path) for path in _models(home / FOLDER)}
    return {POCKET.name: POCKET.reference, **own, **{name: name for name in _fetched()}}


def chosen_base(folder: Path) -> ChosenBase:
    """What `choose_base` noted there last; pocket if that is gone."""
    try:
        chosen = ChosenBase(**json.loads((folder / "base.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return POCKET
    on_disk = Path(chosen.reference).is_absolute()
    return POCKET if on_disk and not Path(chosen.reference).exists() else chosen


def choose_base(folder: Path, home: Path, name: str, engine: "Engine") -> ChosenBase:
    """Load a base, and note it as the person's.

    Raises:
        ConfigError: there is none of that name.
        SboraError: it cannot be loaded; the one chosen before stays.
    """
    reference = found_bases(home).get(name)
    if reference is None:
        raise ConfigError(f"there is no base {name!r} any more", "reload the page to see all")
    chosen = POCKET
    if reference != POCKET.reference:
        with engine.pipeline(reference) as pipeline:
            base = pipeline.base
            chosen = ChosenBase(name, reference, base.key, base.resolution)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "base.json", json.dumps(asdict(chosen)).encode())
    return chosen


def _models(folder: Path) -> Iterator[Path]:
    """Model folders and checkpoints; a folder that only serves the checkpoint beside it is none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        beside = path.with_name(f"{path.name}.safetensors").is_file()
        is_folder = (path / "model_index.json").is_file() and not beside
        if is_folder or (path.suffix == ".safetensors" and path.is_file()):
            yield path


def _fetched() -> Iterator[str]:
    """Ids of model folders in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda r: r.repo_id):
        snapshots = [revision.snapshot_path for revision in repository.revisions]
        if any((path / "model_index.json").is_file() for path in snapshots):
            yield repository.repo_id
