"""One process's part of a comparison: what it needs, what is left to do, and when it must end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sbora_diffusion.alignment import Judges
from sbora_diffusion.comparison.lines import Line, Record
from sbora_diffusion.comparison.measuring import Measures
from sbora_diffusion.comparison.preset import Changes, Entry, Preset
from sbora_diffusion.comparison.trained import Files, Trained, train_all
from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.diffusion.baselines.adapted_methods import ClassWord
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.evaluation.prompt_sets import load_prompts
from sbora_diffusion.evaluation.protocols import find_protocol
from sbora_diffusion.records import run_of

Item = TypeVar("Item")
WHAT = "alignment of concepts by method"


class OutOfTimeError(Exception):
    """The limit of the run is over; what is done is recorded."""


@dataclass(frozen=True)
class Part:
    """What this process does of the work that several have.

    Attributes:
        number: 1 … of.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"--part must be 1 to {self.of}, got {self.number}")

    def share(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.number - 1 :: self.of])

    def file(self, preset: str) -> str:
        """Of the record, without a suffix."""
        return preset if self.of == 1 else f"{preset}-{self.number}-of-{self.of}"


@dataclass
class Progress:
    """How far this process is.

    Attributes:
        report: called with (lines done, lines in all, what is being done).
        ends: when the limit is over, on the clock of `time.monotonic`.
    """

    report: Callable[[int, int, str], None] = lambda _done, _total, _note: None
    ends: float = float("inf")
    done: int = 0
    total: int = 0

    def begin(self, lines: int) -> None:
        self.total = lines
        self.report(0, lines, "")

    def say(self, note: str) -> None:
        """Say what comes next.

        Raises:
            OutOfTimeError: the limit is over.
        """
        self.report(self.done, self.total, note)
        if time.monotonic() >= self.ends:
            raise OutOfTimeError

    def step(self, note: str) -> None:
        """One line more."""
        self.done += 1
        self.report(self.done, self.total, note)


@dataclass
class Work:
    """Everything that a run reads.

    Attributes:
        judges: None where nothing is judged.
        subjects: those that are asked for, in their order.
        slots: of all of the preset's concepts, also those that are not asked for.
        entries: names of the preset's methods.
        tuned: entry → what its tuning found; nothing for those that have none.
        files: folder of the trained concepts.
        origin: command and commit, for the lines.
        pictures: a folder for all that is drawn.
    """

    preset: Preset
    base: Base
    judges: Judges | None
    subjects: Mapping[str, Subject]
    slots: Mapping[str, int]
    entries: Sequence[str]
    seeds: Sequence[int]
    tuned: Mapping[str, Changes]
    record: Record
    files: Path
    origin: Mapping[str, Any]
    part: Part = Part()
    progress: Progress = field(default_factory=Progress)
    pictures: Path | None = None

    def measures(self, num: int, by_group: bool = True) -> Measures:
        """Of these subjects, with so many pictures of each prompt; see `Measures`."""
        preset = self.preset
        assert self.judges is not None
        return Measures(
            self.base,
            self.judges,
            [find_protocol(name) for name in preset.protocols],
            self.subjects,
            load_prompts(preset.wording),
            preset.drawing(num),
            preset.drawn_at_once,
            by_group,
        )

    def line(
        self, name: str, concept: str, seed: int, num: int, changes: Changes, **more: Any
    ) -> dict[str, Any]:
        """The head of a line: what it is about, and all that decides its figures.

        Args:
            changes: in the recipe beside those of the preset.
            more: further keys.
        """
        preset, entry = self.preset, self.preset.methods[name]
        settings = self.subjects[concept].settings
        assert self.judges is not None
        return {
            "what": WHAT,
            "preset": preset.name,
            "method": name,
            "title": entry.name,
            **more,
            "concept": concept,
            "category": settings.category,
            "seed": seed,
            "setting": {
                "base": self.base.key,
                "judges": [j.name for j in (self.judges.clip, *self.judges.further)],
                "protocols": list(preset.protocols),
                "wording": preset.wording,
                "drawing": preset.drawing(num),
                "slot": self.slots[concept],
                "config": preset.config(name, seed, changes).model_dump(mode="json"),
            },
        }

    def finish(self, line: Line, began: float, found: Mapping[str, Any]) -> None:
        """Record a line with what was found and where it comes from."""
        seconds = time.monotonic() - began
        run = run_of(self.origin["command"], str(self.base.device), seconds, self.origin["commit"])
        self.record.add({**line, **found, "run": run})
        self.progress.step(" ".join(str(line[key]) for key in ("method", "seed", "concept")))

    def trained(self, name: str, seed: int, names: Sequence[str]) -> dict[str, Trained[Any]]:
        """Concepts of an entry: those that are kept, and the others trained now.

        Raises:
            ConflictError: one that is kept belongs to another base or recipe.
            NonFiniteError: a loss became NaN or infinite.
        """
        how = self.preset.methods[name].how
        config = self.preset.config(name, seed, self.tuned.get(name))
        if isinstance(how, ClassWord):
            return self._trained_now(name, seed, names, None)
        files = Files(self.files / self.preset.name / f"{name}-{seed}", how, self.base, config)
        kept = {n: found for n in names if (found := files.get(n)) is not None}
        missing = [n for n in names if n not in kept]
        kept |= self._trained_now(name, seed, missing, files) if missing else {}
        return {n: kept[n] for n in names}

    def _trained_now(
        self, name: str, seed: int, names: Sequence[str], files: Files | None
    ) -> dict[str, Trained[Any]]:
        entry = self.preset.methods[name]
        config = self.preset.config(name, seed, self.tuned.get(name))
        self.progress.say(f"training {entry.name}, seed {seed}")
        found = train_all(
            entry.how, self.base, {n: self.subjects[n] for n in names}, self.slots, config,
            self.preset.at_once,
            lambda _, step: self._say_step(entry, seed, step.step, step.steps),
        )  # fmt: skip
        for concept, trained in found.items():
            if files:
                files.put(concept, trained)
        return found

    def _say_step(self, entry: Entry, seed: int, step: int, steps: int) -> None:
        if step % 50 == 0:
            self.progress.report(
                self.progress.done,
                self.progress.total,
                f"training {entry.name}, seed {seed}, step {step} of {steps}",
            )

    def left(self, heads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those lines that the record does not have.

        Raises:
            ConflictError: it has one of another setting.
        """
        return [head for head in heads if self.record.find(head) is None]

    @contextmanager
    def until_the_limit(self) -> Iterator[None]:
        """Work that ends early, but orderly, when the limit is over."""
        try:
            yield
        except OutOfTimeError:
            self.progress.report(self.progress.done, self.progress.total, "the limit is over")


def read_subjects(folder: Path, names: Sequence[str]) -> dict[str, Subject]:
    """Name of the folder → subject; all that have a concept.toml if none are named.

    Raises:
        DataError: there are none, or one is missing, has no pictures or pictures that are none.
        ConfigError: see `read_subject`.
    """
    if not folder.is_dir():
        raise DataError(f"folder {folder} with the concepts does not exist", "give another")
    names = names or sorted(file.parent.name for file in folder.glob("*/concept.toml"))
    if not names:
        raise DataError(f"{folder} has no folder with a concept.toml", "give another folder")
    return {name: read_subject(folder / name) for name in names}
