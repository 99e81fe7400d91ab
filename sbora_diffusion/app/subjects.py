"""What the tab Concepts does without its page: uploaded pictures become concept folders."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sbora_diffusion.app.workspace import Workspace
from sbora_diffusion.core.errors import ConfigError, ConflictError, DataError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.settings import validate
from sbora_diffusion.diffusion.concepts import ConceptSettings, Subject, image_files, read_subject

MAX_PICTURES = 40
MAX_SIDE = 2048
"""Pictures are kept at most so large: no base trains on more."""
MAX_CAPTION = 1000


def read_upload(path: Path) -> Image.Image:
    """One uploaded picture, upright and in RGB; its size is checked before it is decoded.

    Raises:
        DataError: names the file as the person knows it.
    """
    from sbora_diffusion.diffusion.dataset import open_image  # torch

    try:
        return open_image(path)
    except DataError as error:
        raise DataError(error.problem.replace(str(path), path.name), error.remedy) from error


def usable(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The uploads that are pictures, and what is wrong with the others."""
    good, problems = [], []
    for path in paths:
        try:
            read_upload(path)
            good.append(path)
        except DataError as error:
            problems.append(str(error))
    return good, problems


def save_subject(
    workspace: Workspace,
    facts: Mapping[str, str],
    pictures: Sequence[Path],
    captions: Mapping[str, str],
) -> Path:
    """Make a concept folder of uploads: `concept.toml`, pictures without their metadata, captions.

    Args:
        facts: of `ConceptSettings`; without a token it is the name in brackets.
        captions: path of a picture → what is on it.

    Raises:
        ConfigError: a fact is missing or malformed.
        ConflictError: there is a concept of that name already.
        DataError: there are no pictures, too many, or one cannot be read.
        ResourceError: it cannot be written. Nothing is left behind.
    """
    settings = _settings(facts)
    if not 1 <= len(pictures) <= MAX_PICTURES:
        raise DataError(
            f"A concept is learned from 1 to {MAX_PICTURES} pictures, here are {len(pictures)}",
            "add three to ten that show it from different sides",
        )
    folder = workspace.subjects / settings.name
    if folder.exists():
        raise ConflictError(
            f"There is a concept {settings.name!r} already", "take another name, or delete it first"
        )
    write_folder(folder, lambda unfinished: _write(unfinished, settings, pictures, captions))
    return folder


def find_subjects(workspace: Workspace) -> dict[str, Subject]:
    """Name → concept folder, of all that were made here and can be read."""
    if not workspace.subjects.is_dir():
        return {}
    folders = sorted(f for f in workspace.subjects.iterdir() if not f.name.startswith("."))
    return {folder.name: read_subject(folder) for folder in folders if folder.is_dir()}


def delete_subject(workspace: Workspace, name: str) -> None:
    """Delete a concept folder; a concept file that was trained from it stays.

    Raises:
        ConfigError: there is none.
    """
    if name not in find_subjects(workspace):
        raise ConfigError(f"there is no concept folder {name!r}", "reload the page to see all")
    shutil.rmtree(workspace.subjects / name)


def first_picture(workspace: Workspace, name: str) -> Path:
    """The picture that stands for a concept folder."""
    return image_files(workspace.subjects / name)[0]


def _settings(facts: Mapping[str, str]) -> ConceptSettings:
    given = {key: text.strip() for key, text in facts.items() if text and text.strip()}
    for key, what in (("name", "name"), ("class_noun", "class word")):
        if key not in given:
            raise ConfigError(f"The concept has no {what}", "fill it in")
    given.setdefault("token", f"<{given['name'].lower()}>")
    return validate(ConceptSettings, given, "the concept")


def _write(
    folder: Path,
    settings: ConceptSettings,
    pictures: Sequence[Path],
    captions: Mapping[str, str],
) -> None:
    # Strings of JSON are strings of TOML, but for DEL, which the settings refuse.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in settings.model_dump().items()]
    (folder / "concept.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number, path in enumerate(pictures, 1):
        image = read_upload(path)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(folder / f"{number:02d}.jpg", quality=95)
        if caption := captions.get(str(path), "").strip()[:MAX_CAPTION]:
            (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
