"""The concepts that a person can choose from: examples and the files that the library knows."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sbora_diffusion.core.errors import ConfigError, ResourceError, SboraError
from sbora_diffusion.library import EXAMPLES, Entry, Library

if TYPE_CHECKING:  # torch takes seconds to import: only once it is needed
    from sbora_diffusion.core.concept import Concept


@dataclass(frozen=True)
class Card:
    """One concept to choose.

    Attributes:
        key: unique on the page.
        thumbnail: a picture beside the file.
        in_set: whether the file holds other concepts too; the library knows it by its name then.
        by_name: whether commands, too, take its name for this concept and no other.
    """

    key: str
    name: str
    class_noun: str
    token: str
    path: Path
    thumbnail: Path | None = None
    in_set: bool = False
    by_name: bool = False


def find_cards(
    library: Library, examples: Path | None, base: str = "pocket"
) -> tuple[list[Card], list[str]]:
    """The concepts of a base that can be chosen now, and what is wrong with those that cannot.

    A concept of the library takes the place of an example of the same name.

    Args:
        examples: a folder of concept files, if there is one.
        base: the library's key of the base, or its family.
    """
    cards: dict[str, Card] = {}
    problems: list[str] = []
    entries = _entries(library, problems)
    named = Counter(entry.name for entry in entries)
    for path in sorted(examples.glob("*.safetensors")) if examples else ():
        shipped = examples == EXAMPLES and path.stem not in named
        _put(cards, problems, path, by_name=shipped)
    own: set[str] = set()
    for path, name in _files(entries, base):
        card = _put(cards, problems, path, name, own, named[name] == 1)
        own |= {card.key} if card else set()
    return list(cards.values()), problems


def _entries(library: Library, problems: list[str]) -> list[Entry]:
    try:
        return library.concepts()
    except SboraError as error:
        problems.append(str(error))
        return []


def _files(entries: list[Entry], base: str) -> list[tuple[Path, str]]:
    """The files of a base's concepts, each with the name of the concept."""
    own = [entry for entry in entries if base in (entry.base, entry.base.partition("-")[0])]
    found = [(Path(entry.path), entry.name) for entry in own if entry.path]
    return [(path, name) for path, name in found if path.is_file()]


def _put(
    cards: dict[str, Card],
    problems: list[str],
    path: Path,
    name: str | None = None,
    taken: set[str] | None = None,
    by_name: bool = False,
) -> Card | None:
    """Add the card of a file, under another key if the name is in `taken`."""
    try:
        card = replace(read_card(path, name)[1], by_name=by_name)
    except SboraError as error:
        problems.append(str(error))
        return None
    if taken and card.name in taken:
        card = replace(card, key=f"{card.name} ({path.parent.name}/{path.name})")
    cards[card.key] = card
    return card


def read_card(path: Path, name: str | None = None) -> "tuple[Concept, Card]":
    """A concept and its card; the same object as long as the file does not change.

    Args:
        name: of the concept that is meant in a file that may hold several.

    Raises:
        ConfigError: the file holds no concept of that name, or several and none is named.
        SboraError: see `read_concepts`.
    """
    try:
        stamp = path.stat()
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    return _read_once(path, name, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=64)
def _read_once(path: Path, name: str | None, _modified: int, _size: int) -> "tuple[Concept, Card]":
    from sbora_diffusion.core.concept_set import read_concepts, read_member

    found = read_concepts(path)
    in_set = bool(found.digest)
    if in_set and name is None:
        raise ConfigError(
            f"{path} holds several concepts", f"`sbora library add {path}` makes each usable here"
        )
    concept = read_member(path, name) if name else found.concepts[0][0]
    meta = concept.meta
    token = meta.tokens[0].token if meta.tokens else ""
    beside = path.with_name(meta.name) if in_set else path.with_suffix("")
    pictures = (beside.with_name(beside.name + suffix) for suffix in (".jpg", ".png", ".webp"))
    thumbnail = next((picture for picture in pictures if picture.is_file()), None)
    return concept, Card(meta.name, meta.name, meta.class_noun, token, path, thumbnail, in_set)
