"""Where one person's concepts, pictures and jobs lie."""

import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.app.bases import ChosenBase, chosen_base
from sbora_diffusion.cards import Card, find_cards
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.schema import NAME_PATTERN
from sbora_diffusion.library import EXAMPLES, Library

KEPT_SECONDS = 600.0


@dataclass(frozen=True)
class Workspace:
    """One person's library, and a folder for what the app makes.

    Attributes:
        examples: a folder of concept files that everybody sees.
    """

    library: Library
    folder: Path
    examples: Path = EXAMPLES

    @property
    def subjects(self) -> Path:
        """Concept folders: pictures that were uploaded, and their `concept.toml`."""
        return self.folder / "subjects"

    @property
    def concepts(self) -> Path:
        """Concept files that were trained or brought here."""
        return self.folder / "concepts"

    @property
    def outputs(self) -> Path:
        """What was merged, exported or judged."""
        return self.folder / "outputs"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def base(self) -> ChosenBase:
        """The base that this person draws and trains with."""
        return chosen_base(self.folder)

    def cards(self) -> tuple[list[Card], list[str]]:
        """The base's concepts that can be chosen now, and what is wrong with those that cannot."""
        base = self.base
        return find_cards(self.library, self.examples if base.is_pocket else None, base.key)

    def card(self, key: str) -> Card:
        """The concept of that key.

        Raises:
            ConfigError: there is none any more.
        """
        for card in self.cards()[0]:
            if card.key == key:
                return card
        raise ConfigError(f"there is no concept {key!r} any more", "reload the page to see all")

    def chosen(self, selection: Mapping[str, float]) -> list[Card]:
        """The concepts of a selection (key → weight) in an order that depends on the keys alone.

        Raises:
            ConfigError: one is not there any more.
        """
        return [self.card(key) for key in sorted(selection)]

    def specs(self, selection: Mapping[str, float]) -> list[str]:
        """The same as commands take them: by names where these say enough, else by files."""
        return [_spec(card, selection[card.key]) for card in self.chosen(selection)]


def _spec(card: Card, weight: float) -> str:
    if not (card.by_name or card.in_set):
        return f"{card.path}:{weight:g}"
    return card.name if weight == 1 else f"{card.name}:{weight:g}"


class Workspaces:
    """A workspace for each person who may log in; for one person alone, the machine's library.

    Args:
        library: the library file, the default one if not given; the app's folder is beside it.
        people: names of all logins.

    Raises:
        ConfigError: a login's name cannot name a folder.
    """

    def __init__(
        self, library: str | Path | None, examples: Path = EXAMPLES, people: Sequence[str] = ()
    ):
        # Commands run in another folder than the app: paths are absolute.
        shelf = Library(Library(library).path.absolute())
        folder = shelf.path.parent / f"{shelf.path.stem}.app"
        self._own: dict[str, Workspace] = {}
        for person in people if len(people) > 1 else ():
            if not re.match(NAME_PATTERN, person):
                raise ConfigError(
                    f"{person!r} cannot be the name of a login", "take letters, digits, _ and -"
                )
            home = folder / "people" / person
            self._own[person] = Workspace(Library(home / "library.sqlite3"), home, examples)
        self._shared, self.home = Workspace(shelf, folder, examples), folder

    def of(self, person: str | None) -> Workspace:
        """The workspace of a login; None where nobody logs in."""
        return self._own[person or ""] if self._own else self._shared

    def __iter__(self) -> Iterator[Workspace]:
        return iter(self._own.values() if self._own else (self._shared,))


class Handout:
    """Files on their way to the browser: the server copies them from here, and from nowhere else.

    Each lies in a folder whose name cannot be guessed, until long after the server took it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sbora-app-")

    def place(self, name: str) -> Path:
        """A path for a new file of that name."""
        self._sweep()
        folder = Path(self._folder.name) / secrets.token_hex(8)
        folder.mkdir()
        return folder / name

    def copy(self, file: Path) -> Path:
        """A file, or a folder as one archive."""
        if file.is_dir():
            made = shutil.make_archive(str(self.place(file.name)), "zip", file)
            return Path(made)
        return Path(shutil.copyfile(file, self.place(file.name)))

    def _sweep(self) -> None:
        oldest = time.time() - KEPT_SECONDS
        for folder in Path(self._folder.name).iterdir():
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
