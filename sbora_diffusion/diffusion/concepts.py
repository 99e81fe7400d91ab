"""A concept folder: `concept.toml` and reference images, each with an optional caption."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sbora_diffusion.core.errors import DataError
from sbora_diffusion.core.schema import NAME_PATTERN, TOKEN_PATTERN
from sbora_diffusion.core.settings import read_toml, validate

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class ConceptSettings(BaseModel):
    """What `concept.toml` says; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    class_noun: Annotated[
        str,
        StringConstraints(
            strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"
        ),
    ]
    token: Annotated[str, StringConstraints(pattern=TOKEN_PATTERN)]
    category: Literal["character", "object"] = "object"
    licence: str = ""
    source: str = ""


class Subject(BaseModel):
    """A concept to be learned: its settings and its pictures."""

    model_config = ConfigDict(frozen=True)

    settings: ConceptSettings
    images: tuple[Path, ...] = Field(min_length=1)

    def caption(self, image: Path) -> str | None:
        """The text of the `.txt` file beside an image, with the token in it, if there is one."""
        beside = image.with_suffix(".txt")
        if not beside.is_file():
            return None
        text = beside.read_text(encoding="utf-8-sig", errors="replace").strip()
        if not text:
            return None
        return text if self.settings.token in text else f"{self.settings.token}, {text}"


def read_subject(folder: Path) -> Subject:
    """Read a concept folder.

    Raises:
        DataError: the folder or its images are missing.
        ConfigError: `concept.toml` is missing, has an unknown key or lacks a needed one.
    """
    if not folder.is_dir():
        raise DataError(
            f"concept folder {folder} does not exist",
            "give a folder with concept.toml and reference images",
        )
    source = folder / "concept.toml"
    settings = validate(ConceptSettings, {"name": folder.name, **read_toml(source)}, str(source))
    images = image_files(folder)
    if not images:
        raise DataError(
            f"{folder} has no reference images",
            f"add three to ten pictures ({', '.join(sorted(IMAGE_SUFFIXES))})",
        )
    return Subject(settings=settings, images=tuple(images))


def image_files(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        # Hidden files such as ._01.jpg are a file manager's notes, not pictures.
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
