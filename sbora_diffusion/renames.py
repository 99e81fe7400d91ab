"""Renamed copies of concept files, for concepts that clash in token or name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbora_diffusion.check import Member
from sbora_diffusion.core.concept import Concept, write_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.renaming import free_name, free_token, renamed
from sbora_diffusion.outputs import CONCEPT_SUFFIX, check_writable, make_parent


@dataclass(frozen=True)
class Rename:
    """A way out of a clash.

    Attributes:
        tokens: old → new.
        name: the new name, None if it stays.
    """

    member: Member
    tokens: dict[str, str]
    name: str | None

    @property
    def called(self) -> str:
        """The new token and name, for people."""
        return " ".join([*self.tokens.values(), *([f"({self.name})"] if self.name else [])])

    @property
    def option(self) -> str:
        """What to write after --rename to get this or a like rename."""
        name = self.member.concept.meta.name
        token = next(iter(self.tokens.values()), f"<{(self.name or name).lower()}>")
        return f"'{self.member.place if self.name else name}={token}'"

    @property
    def file(self) -> str:
        """Name of the copy: the new token's word, or the new name if the token stays."""
        word = next((token[1:-1] for token in self.tokens.values()), self.name)
        return f"{word}{CONCEPT_SUFFIX}"

    def copy(self) -> Concept:
        return renamed(self.member.concept, self.tokens, self.name)

    def document(self) -> dict[str, Any]:
        return {"concept": self.member.label, "tokens": self.tokens, "name": self.name}


def offered_renames(group: Sequence[Member]) -> list[Rename]:
    """For each concept whose token or name an earlier one has: what it could be called instead.

    One and the same concept given twice is no clash of names; nothing is offered for it.
    """
    tokens, names = {t for m in group for t in m.tokens}, {m.concept.meta.name for m in group}
    earlier: list[Member] = []
    offers = []
    for member in group:
        if member.concept.meta.digest not in {m.concept.meta.digest for m in earlier}:
            offer = _offer(member, earlier, tokens, names)
            tokens |= set(offer.tokens.values())
            names |= {offer.name or member.concept.meta.name}
            offers += [offer] if offer.tokens or offer.name else []
        earlier.append(member)
    return offers


def asked_rename(group: Sequence[Member], text: str) -> Rename:
    """Read `NAME=<token>` or `FILE=<token>`. The name changes too if another concept has it.

    Raises:
        ConfigError: not of that form, the concept is not there or not the only one, or the token
            is taken or not allowed.
    """
    key, equals, token = text.rpartition("=")
    if not equals or not key:
        raise ConfigError(f"--rename {text!r} must be NAME=<token>", "e.g. 'dog=<my-dog>'")
    member = _the_one(group, key)
    others = [other for other in group if other is not member]
    if any(token in m.tokens for m in group):
        raise ConfigError(f"--rename {text!r}: {token} is in use already", "choose another token")
    names = {other.concept.meta.name for other in others}
    own = member.concept.meta.name
    name = None
    if own in names:
        word = token[1:-1]
        name = word if word not in names else free_name(own, names)
    rename = Rename(member, {_old_token(member, others): token}, name)
    rename.copy()  # refuses what is not allowed before anything is written
    return rename


def write_renamed(renames: Sequence[Rename], folder: Path) -> dict[str, tuple[Path, Rename]]:
    """Write all copies; nothing is overwritten.

    Returns:
        The renamed concept's former label → its new file and what changed.

    Raises:
        ConfigError: a file of that name exists, or two renames are for one concept or file.
        ResourceError: it cannot be written.
    """
    copies = {rename.member.label: (folder / rename.file, rename) for rename in renames}
    files = [file for file, _ in copies.values()]
    if len(set(files)) < len(renames):
        raise ConfigError("two renames are for one concept or one token", "give each once")
    for file in files:
        if os.path.lexists(file):
            raise ConfigError(f"{file} exists already", "give another folder with --output")
        check_writable(file)
    for file, rename in copies.values():
        make_parent(file)
        write_concept(file, rename.copy(), overwrite=False)
    return copies


def _offer(member: Member, earlier: Sequence[Member], tokens: set[str], names: set[str]) -> Rename:
    seen = {token for other in earlier for token in other.tokens}
    taken = set(tokens)
    new = {}
    for token in member.tokens:
        if token in seen:
            new[token] = free_token(token, taken)
            taken.add(new[token])
    name = member.concept.meta.name
    clashes = name in {other.concept.meta.name for other in earlier}
    return Rename(member, new, free_name(name, names) if clashes else None)


def _the_one(group: Sequence[Member], key: str) -> Member:
    """The concept of that place, name or label; a name that two have is refused."""
    for fits in (
        lambda m: m.place == key or m.place.startswith(f"{key}:"),
        lambda m: m.concept.meta.name == key,
        lambda m: m.label == key,
    ):
        found = [member for member in group if fits(member)]
        if found:
            break
    if len(found) == 1:
        return found[0]
    known = ", ".join(repr(member.label) for member in group)
    problem = "several concepts are" if found else "no concept is"
    raise ConfigError(f"--rename: {problem} called {key!r}", f"there are {known}; a file does too")


def _old_token(member: Member, others: Sequence[Member]) -> str:
    """The token to be replaced: the only one, or the only one that clashes."""
    clashing = [t for t in member.tokens if any(t in other.tokens for other in others)]
    candidates = clashing or member.tokens
    if len(candidates) != 1:
        raise ConfigError(
            f"{member.label} has {len(candidates)} tokens that could be meant, {candidates}",
            "use --apply, which renames all that clash",
        )
    return candidates[0]
