"""Everything that one process of a comparison needs, read and checked before the first training."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.alignment import load_judges
from sbora_diffusion.bench.plan import chosen
from sbora_diffusion.comparison.lines import Record
from sbora_diffusion.comparison.preset import Preset
from sbora_diffusion.comparison.tuning import read_tuned
from sbora_diffusion.comparison.work import Part, Progress, Work, read_subjects
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.records import commit_here


@dataclass(frozen=True)
class Asked:
    """What a command's options ask for; nothing given is all that the preset has.

    Attributes:
        out: folder of the record.
        files: folder of the trained concepts.
        command: as typed.
        commit: of the code, where there is no checkout.
        limit: seconds.
    """

    out: Path
    files: Path
    command: str
    commit: str | None = None
    pictures: Path | None = None
    part: int = 1
    parts: int = 1
    limit: float | None = None
    methods: Sequence[str] = ()
    seeds: Sequence[int] = ()
    concepts: Sequence[str] = ()
    judged: bool = True


def open_work(preset: Preset, load: Callable[[], Base], asked: Asked) -> Work:
    """The work of this process.

    Args:
        load: gives the base; called when all that is quicker to check is right.

    Raises:
        ConfigError: a name is unknown, the part is none, a judge is missing, or there is no commit
            to name.
        DataError: a concept's folder or pictures are missing.
        FormatError: the record or the tuning's is something else.
    """
    ends = float("inf") if asked.limit is None else time.monotonic() + asked.limit
    share = Part(asked.part, asked.parts)
    entries = chosen(asked.methods, preset.methods, "method") or list(preset.methods)
    subjects = read_subjects(preset.concepts_folder, preset.concepts)
    names = chosen(asked.concepts, subjects, "concept") or list(subjects)
    record, tuned = Record(asked.out, share.file(preset.name)), read_tuned(preset)
    commit = asked.commit or commit_here()
    base = load()
    device = str(base.device)
    return Work(
        preset=preset,
        base=base,
        judges=load_judges(preset.clip, device, preset.dino) if asked.judged else None,
        subjects={name: subjects[name] for name in names},
        slots={name: slot for slot, name in enumerate(subjects)},
        entries=entries,
        seeds=asked.seeds or preset.seeds,
        tuned=tuned,
        record=record,
        files=asked.files,
        origin={"command": asked.command, "commit": commit},
        part=share,
        progress=Progress(ends=ends),
        pictures=asked.pictures,
    )


def to_tune(preset: Preset) -> Preset:
    """The same preset with the subjects that are tuned on, and nothing tuned."""
    folder, subjects = preset.tuning.folder, preset.tuning.subjects
    changes = {"concepts_folder": folder, "concepts": subjects, "tuned": None}
    return preset.model_copy(update=changes)
