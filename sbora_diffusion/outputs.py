"""Can an output be written? Asked before the work that would otherwise be lost."""

import os
import tempfile
from itertools import count
from pathlib import Path

from PIL import Image

from sbora_diffusion.core.concept_set import read_concepts
from sbora_diffusion.core.errors import ConfigError, ConflictError, ResourceError, SboraError

CONCEPT_SUFFIX = ".safetensors"
PICTURE = Path("picture.png")
"""What a drawing is called that is given no name."""


def check_concept_output(path: Path) -> None:
    """Refuse an output that could not be written or would destroy another file.

    Raises:
        ConfigError: not named `.safetensors`, a folder, or a file that holds no concepts.
        ResourceError: the folder cannot be written.
    """
    if path.suffix != CONCEPT_SUFFIX:
        raise ConfigError(f"output {path} must end in {CONCEPT_SUFFIX}", f"e.g. {path}.safetensors")
    check_writable(path)
    if path.exists():
        try:
            read_concepts(path)
        except SboraError as error:
            raise ConfigError(
                f"{path} exists and is not a concept file", "choose another output or delete it"
            ) from error


def check_picture_output(path: Path) -> None:
    """Refuse a plot or sheet that could not be written or would destroy another file.

    Raises:
        ConfigError: not named `.png`, a folder, or a file that no command here drew.
        ResourceError: it cannot be written.
    """
    (file,) = picture_files(path, 1)
    check_writable(file)
    if os.path.lexists(file) and not _drawn_here(file):
        raise ConfigError(
            f"{path} exists and was not drawn by sbora", "choose another output or delete it"
        )


def check_model_output(folder: Path) -> None:
    """Refuse a folder that cannot be made or that holds something.

    Raises:
        ConflictError: it exists and is not empty.
        ResourceError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} exists and is not empty", "give another --output")
    _try_writing(folder)


def check_writable(path: Path) -> None:
    """Refuse a file that could not be made; folders above it may still be missing.

    Raises:
        ConfigError: it is a folder.
        ResourceError: nothing can be written there.
    """
    if path.is_dir():
        raise ConfigError(f"output {path} is a folder", "give the name of a file")
    _try_writing(path)


def picture_files(output: Path, num: int) -> list[Path]:
    """`out.png`, or `out_000.png`, `out_001.png` … for several pictures.

    Raises:
        ConfigError: not named `.png`.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"output {output} must end in .png", f"e.g. {output}.png")
    if num == 1:
        return [output]
    return [output.with_name(f"{output.stem}_{k:03d}{output.suffix}") for k in range(num)]


def new_pictures(output: Path | None, num: int) -> list[Path]:
    """The files of pictures that replace nothing: `picture.png`, or `picture_2.png` … where that
    is taken; a name that was given is kept to.

    Raises:
        ConfigError: not named `.png`, a folder, or a file of that name exists.
        ResourceError: nothing can be written there.
    """
    if output is None:
        named = (
            PICTURE.with_stem(f"{PICTURE.stem}_{k}" if k > 1 else PICTURE.stem) for k in count(1)
        )
        output = next(
            name for name in named if not any(map(os.path.lexists, picture_files(name, num)))
        )
    files = picture_files(output, num)
    for file in files:
        check_writable(file)
        if os.path.lexists(file):
            raise ConfigError(f"{file} exists", "give another --output, or delete it")
    return files


def make_parent(path: Path) -> None:
    """Make the missing folders above a file.

    Raises:
        ResourceError: they cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _drawn_here(file: Path) -> bool:
    """Whether a picture says how it was made, as `pictures.save_png` writes it."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return "sbora" in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _try_writing(path: Path) -> None:
    """Make a nameless file where `path`, or the first missing folder above it, will be made."""
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{path} cannot be written: {error.strerror}", "choose a folder that is writable"
    )
