"""Training many concepts into the library, several at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sbora_diffusion.checkpointing import (
    NONE,
    Checkpointing,
    Resumable,
    checkpoint_folder,
    discard,
    resumed_slots,
)
from sbora_diffusion.core.checkpoints import CheckpointFolder
from sbora_diffusion.core.concept import Concept, concept_bytes
from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.core.storage import written_together
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining, shared_settings
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.jobs import TrainResult, index_widths, train_concept, train_result
from sbora_diffusion.library import Library, Reservation
from sbora_diffusion.outputs import check_concept_output, make_parent
from sbora_diffusion.reservations import Held, reserved

MOST_AT_ONCE = 16


def train_concepts(
    base: Base,
    subjects: Sequence[Subject],
    config: TrainConfig,
    *,
    library: Library,
    folder: Path,
    at_once: int | None = None,
    slots: Mapping[str, int] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    checkpointing: Checkpointing = NONE,
) -> list[TrainResult]:
    """Reserve all ranges, train in groups, and write `<folder>/<name>.safetensors` of each.

    A failure leaves the groups before it finished, and of its own group and the later ones nothing.

    Args:
        at_once: concepts in a group; by default one on a CPU, where a group is no faster, else up
            to 16. A recipe that cannot be shared trains one after another.
        slots: name → explicit slot, see `jobs.train_concept`; the library's choice by default.
        on_start: called with the size of the groups, before the first trains.
        on_step: called with (steps done, steps in all, mean loss), over all groups.
        checkpointing: how each group is saved while it trains, and gone on with; those of groups
            that are finished stay until all are.

    Returns:
        What each training gave, in the order of the subjects; the seconds are its group's.

    Raises:
        ConfigError, ConflictError: before anything is trained.
        SboraError: see `jobs.train_concept`.
    """
    names = [subject.settings.name for subject in subjects]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConflictError(f"two subjects are called {min(twice)!r}", "rename one")
    for name in names:
        check_concept_output(concept_file(folder, name))
    size = group_size(base, config, len(subjects), at_once)
    groups = [subjects[k : k + size] for k in range(0, len(subjects), size)]
    results: list[TrainResult] = []
    widths = index_widths(base, config)
    places = [_place(folder, group) for group in groups]
    slots = resumed_slots(checkpointing, places, slots)
    how = replace(checkpointing, keep_last=len(groups) > 1)
    with reserved(library, base.key, config.variant, names, config.rank, widths, slots) as held:
        if on_start:
            on_start(size)
        for number, group in enumerate(groups):
            report = _reporter(on_step, number, len(groups))
            train = _train_one if len(group) == 1 else _train_group
            results += train(base, group, config, library, folder, held, report, how)
            held.finished.update(subject.settings.name for subject in group)
    if how.keep_last:
        discard(checkpointing, places)
    return results


def group_size(base: Base, config: TrainConfig, count: int, at_once: int | None) -> int:
    """How many concepts train in one batch.

    Raises:
        ConfigError: more than one was asked for and the recipe cannot be shared.
    """
    alone = shared_settings(config) is None
    if at_once is None:
        return 1 if alone or base.device.type == "cpu" else max(1, min(count, MOST_AT_ONCE))
    if at_once < 1 or (at_once > 1 and alone):
        allowed = "1 with dropout, fp16 or aspect buckets" if alone else "1 or more"
        raise ConfigError(f"--at-once must be {allowed}, got {at_once}", "leave it out")
    return at_once


def _train_one(
    base: Base,
    subjects: Sequence[Subject],
    config: TrainConfig,
    library: Library,
    folder: Path,
    held: Held,
    report: Callable[[int, int, float], None],
    checkpointing: Checkpointing,
) -> list[TrainResult]:
    (subject,) = subjects
    return [
        train_concept(
            base,
            subject,
            config,
            library=library,
            output=concept_file(folder, subject.settings.name),
            slot=held.ranges[subject.settings.name].slot,
            on_record=lambda record: report(record.step, record.steps, record.loss),
            checkpointing=checkpointing,
        )
    ]


def _train_group(
    base: Base,
    subjects: Sequence[Subject],
    config: TrainConfig,
    library: Library,
    folder: Path,
    held: Held,
    report: Callable[[int, int, float], None],
    checkpointing: Checkpointing,
) -> list[TrainResult]:
    began = time.monotonic()
    ranges = {subject.settings.name: held.ranges[subject.settings.name] for subject in subjects}
    run = Resumable(checkpointing, _place(folder, subjects), base, subjects, config)
    with run.as_before():
        concepts, losses = _learn(run, subjects, ranges, report)
    files = [concept_file(folder, concept.meta.name) for concept in concepts]
    make_parent(files[0])
    contents = [concept_bytes(concept)[0] for concept in concepts]
    with library.together() as joined, written_together(zip(files, contents, strict=True)):
        for file, concept in zip(files, concepts, strict=True):
            meta, token = concept.meta, concept.meta.tokens[0].token
            if ranges[meta.name].registered:
                joined.record(base.key, meta.variant, meta.name, file, meta.digest, token)
    run.finished()
    seconds = time.monotonic() - began
    parts = zip(files, concepts, ranges.values(), zip(*losses, strict=True), strict=True)
    return [train_result(f, c.meta.digest, r, list(own), seconds) for f, c, r, own in parts]


def _learn(
    run: Resumable,
    subjects: Sequence[Subject],
    ranges: Mapping[str, Reservation],
    report: Callable[[int, int, float], None],
) -> tuple[list[Concept], list[tuple[float, ...]]]:
    """The concepts, and the losses of each step."""
    base, config = run.base, run.config
    lessons = [Lesson(base, s, config, ranges[s.settings.name].start) for s in subjects]
    training = GroupTraining(base, lessons)
    try:
        losses = run.run(
            training,
            {name: range_.slot for name, range_ in ranges.items()},
            lambda record: report(record.step, record.steps, record.loss),
        )
        return training.concepts(), losses
    finally:
        training.close()


def _reporter(
    on_step: Callable[[int, int, float], None] | None, number: int, groups: int
) -> Callable[[int, int, float], None]:
    """Counts the steps of all groups."""

    def report(step: int, steps: int, loss: float) -> None:
        if on_step:
            on_step(number * steps + step, groups * steps, loss)

    return report


def concept_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _place(folder: Path, group: Sequence[Subject]) -> CheckpointFolder:
    """Where the checkpoints of a group lie: beside its first concept file."""
    return checkpoint_folder(concept_file(folder, group[0].settings.name), len(group) - 1)
