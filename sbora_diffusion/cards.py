"""The concepts that a person can choose from: examples and the files that the library knows."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sbora_diffusion.core.errors import ResourceError, SboraError
from sbora_diffusion.library import Library

if TYPE_CHECKING:  # torch takes seconds to import: only once it is needed
    from sbora_diffusion.core.concept import Concept


@dataclass(frozen=True)
class Card:
    """One concept to choose: `key` is unique on the page, `thumbnail` a picture beside the file."""

    key: str
    name: str
    class_noun: str
    token: str
    path: Path
    thumbnail: Path | None = None


def find_cards(library: Library, examples: Path) -> tuple[list[Card], list[str]]:
    """The concepts that can be chosen now, and what is wrong with those that cannot.

    A concept of the library takes the place of an example of the same name.
    """
    cards: dict[str, Card] = {}
    problems: list[str] = []
    for path in sorted(examples.glob("*.safetensors")):
        _put(cards, problems, path)
    own: set[str] = set()
    for path in _library_files(library, problems):
        card = _put(cards, problems, path, taken=own)
        own |= {card.key} if card else set()
    return list(cards.values()), problems


def _library_files(library: Library, problems: list[str]) -> list[Path]:
    try:
        entries = library.concepts()
    except SboraError as error:
        problems.append(str(error))
        return []
    found = [Path(entry.path) for entry in entries if entry.path and _is_pocket(entry.base)]
    return [path for path in found if path.is_file()]


def _put(
    cards: dict[str, Card], problems: list[str], path: Path, taken: set[str] | None = None
) -> Card | None:
    """Add the card of a file, under another key if the name is in `taken`."""
    try:
        card = read_card(path)[1]
    except SboraError as error:
        problems.append(str(error))
        return None
    if taken and card.name in taken:
        card = replace(card, key=f"{card.name} ({path.parent.name}/{path.name})")
    cards[card.key] = card
    return card


def read_card(path: Path) -> "tuple[Concept, Card]":
    """A concept file and its card; the same object as long as the file does not change.

    Raises:
        SboraError: see `read_concept`.
    """
    try:
        stamp = path.stat()
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}") from error
    return _read_once(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=64)
def _read_once(path: Path, _modified: int, _size: int) -> "tuple[Concept, Card]":
    from sbora_diffusion.core.concept import read_concept

    concept = read_concept(path)
    meta = concept.meta
    token = meta.tokens[0].token if meta.tokens else ""
    pictures = (path.with_suffix(suffix) for suffix in (".jpg", ".png", ".webp"))
    thumbnail = next((picture for picture in pictures if picture.is_file()), None)
    return concept, Card(meta.name, meta.name, meta.class_noun, token, path, thumbnail)


def _is_pocket(base: str) -> bool:
    return base.partition("-")[0] == "pocket"
