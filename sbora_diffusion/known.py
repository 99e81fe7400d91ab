"""The concepts that a prompt can call by their tokens: the library's, and pocket's examples."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sbora_diffusion.cards import read_card
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.core.concept_set import read_member
from sbora_diffusion.core.errors import BaseMismatch, ResourceError, SboraError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.prompts import tokens_in
from sbora_diffusion.diffusion.routing import Router, Source
from sbora_diffusion.library import EXAMPLES, Entry, Library


def sources(library: Library, base: Base, examples: Path = EXAMPLES) -> list[Source]:
    """What prompts for this base can call. A concept of the library takes the place of an example
    with its token. Files of the library are read only when a prompt calls them."""
    entries = [entry for entry in library.concepts() if entry.token and entry.path]
    keys = {key for key in {entry.base for entry in entries} if _fits(key, entries, base)}
    known = [_source(entry) for entry in entries if entry.base in keys]
    tokens = {source.token for source in known}
    shipped = _examples(examples) if base.public_name == "pocket" else iter(())
    return known + [source for source in shipped if source.token not in tokens]


def base_called(prompt: str, library: Library) -> str | None:
    """The base of the first concept in the library that a prompt names, if that is public."""
    tokens = tokens_in(prompt)
    for entry in library.concepts() if tokens else []:
        if entry.token in tokens and entry.path:
            name = _read(entry).meta.base_name
            if name:
                return name
    return None


def unknown_tokens(router: Router, prompt: str, library: Library) -> list[str]:
    """One line for each token in a prompt that nothing is known of."""
    elsewhere = {entry.token: entry.base for entry in library.concepts()}
    lines = []
    for token, nearest in router.unknown(prompt).items():
        if token in elsewhere:
            remedy = f"the library has it for another base, {elsewhere[token]}"
        elif nearest:
            remedy = f"did you mean {nearest}?"
        else:
            remedy = "give its file with --concept"
        lines.append(f"no concept for this base has the token {token}; {remedy}")
    return lines


def _fits(key: str, entries: list[Entry], base: Base) -> bool:
    """Whether the concepts of a base key belong to this base; a rounded copy has a key of its own,
    so one of the files is asked."""
    if key == base.key:
        return True
    if key.partition("-")[0] != base.family:
        return False
    for entry in entries:
        if entry.base == key:
            try:
                compare(_read(entry).meta.fingerprint, base.fingerprint)
            except BaseMismatch:
                return False
            except SboraError:
                continue  # this file is gone or damaged, another may tell
            return True
    return False


def _source(entry: Entry) -> Source:
    assert entry.token
    return Source(entry.name, entry.token, entry.path or entry.name, partial(_read, entry))


def _read(entry: Entry) -> Concept:
    assert entry.path
    if not Path(entry.path).is_file():
        raise ResourceError(
            f"the file of {entry.name!r}, {entry.path}, is missing",
            "train it again, or `sbora library remove` it and give a file with --concept",
        )
    return read_member(entry.path, entry.name)


def _examples(folder: Path) -> Iterator[Source]:
    for path in sorted(folder.glob("*.safetensors")):
        card = read_card(path)[1]
        yield Source(card.name, card.token, str(path), partial(read_concept, path))
