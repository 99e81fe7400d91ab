"""What the command line and the app share: train into the library, load concepts, add a file."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from sbora_diffusion import team
from sbora_diffusion.checkpointing import (
    NONE,
    Checkpointing,
    Resumable,
    checkpoint_folder,
    resumed_slots,
)
from sbora_diffusion.core.concept import Concept, write_concept
from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import layer_width
from sbora_diffusion.diffusion.pipeline import draw
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.diffusion.training_loop import StepRecord
from sbora_diffusion.library import Entry, Library, Reservation
from sbora_diffusion.lookup import load_concepts
from sbora_diffusion.outputs import check_concept_output, make_parent
from sbora_diffusion.pictures import save_png
from sbora_diffusion.reservations import entry_of, reserved

__all__ = [
    "Samples",
    "TrainResult",
    "add_to_library",
    "index_widths",
    "load_concepts",
    "save_png",
    "train_concept",
]


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        seconds: all of it, from reading the pictures to the written file.
        loss_first, loss_last: averages over the first and the last tenth of the steps.
    """

    path: Path
    digest: str
    reservation: Reservation
    warnings: tuple[str, ...]
    seconds: float
    loss_first: float
    loss_last: float


@dataclass(frozen=True)
class Samples:
    """Pictures drawn while a concept trains: at step 0, every `every` steps, and at the end."""

    every: int
    prompts: tuple[str, ...]
    folder: Path
    seed: int

    def due(self, step: int, steps: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == steps)


def train_concept(
    base: Base,
    subject: Subject | Path,
    config: TrainConfig,
    *,
    library: Library,
    output: Path,
    slot: int | None = None,
    on_start: Callable[[ConceptTraining, Reservation], None] | None = None,
    on_record: Callable[[StepRecord], None] | None = None,
    sample_every: int = 0,
    sample_prompts: Sequence[str] = (),
    sample_dir: Path | None = None,
    checkpointing: Checkpointing = NONE,
) -> TrainResult:
    """Reserve a range, train, write the concept file, note it in the library.

    Args:
        subject: a subject, or the concept folder to read it from.
        slot: explicit; if another concept owns it, the result is not registered and says so.
        on_start: called once everything is ready to train.
        sample_every: draw pictures every so many steps, 0 for none.
        sample_prompts: of those pictures; "a photo of <token>" by default.
        sample_dir: where they go, `<output stem>.samples` beside the output by default.
        checkpointing: how the training is saved while it runs, and gone on with; not at all by
            default.

    Raises:
        SboraError: nothing but checkpoints is written, and the library is as it was before.
    """
    began = time.monotonic()
    subject = subject if isinstance(subject, Subject) else read_subject(subject)
    check_concept_output(output)
    token = subject.settings.token
    samples = Samples(
        sample_every,
        tuple(sample_prompts) or (f"a photo of {token}",),
        sample_dir or output.with_name(f"{output.stem}.samples"),
        config.seed,
    )
    name, widths = subject.settings.name, index_widths(base, config)
    place = checkpoint_folder(output)
    once = partial(team.once, on_cpu=base.device.type == "cpu")
    run = Resumable(checkpointing, place, base, [subject], config)
    wanted = None if slot is None else {name: slot}
    slots = once(lambda: resumed_slots(checkpointing, [place], wanted))
    hold = reserved(library, base.key, config.variant, [name], config.rank, widths, slots)
    with run.as_before(), ExitStack() as stack:
        reservation = once(lambda: stack.enter_context(hold)).ranges[name]
        training = ConceptTraining(base, subject, config, reservation.start)
        try:
            if on_start:
                on_start(training, reservation)
            losses = _run(run, training, reservation.slot, samples, on_record)
            concept = training.concept()
            digest = once(lambda: _written(output, concept))
        finally:
            training.close()
        if reservation.registered and team.leads():
            library.record(base.key, config.variant, name, output, digest, token)
    run.finished()
    return train_result(output, digest, reservation, losses, time.monotonic() - began)


def _written(output: Path, concept: Concept) -> str:
    make_parent(output)
    return write_concept(output, concept)


def train_result(
    path: Path, digest: str, reservation: Reservation, losses: Sequence[float], seconds: float
) -> TrainResult:
    """What a training with these losses gave."""
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    warnings = _slot_warnings(reservation)
    return TrainResult(path, digest, reservation, warnings, seconds, first, last)


def index_widths(base: Base, config: TrainConfig) -> dict[str, int]:
    """Canonical name of each adapted layer → how many indices all concepts share there."""
    layers = target_layers(base.pipeline, config.targets)
    return {name: layer_width(layer, config.variant) for name, layer in layers.items()}


def add_to_library(
    path: Path,
    concepts: Sequence[Concept],
    base: Base,
    library: Library,
    allow_overlap: bool = False,
) -> list[Entry]:
    """Register the concepts of a file that were trained elsewhere, in the ranges that they have.

    Args:
        allow_overlap: also where another concept owns that range; no prompt may then call both.

    Raises:
        BaseMismatch: one belongs to another base.
        ConflictError: its name or, unless allowed, its range belongs to another concept.
        ConfigError: its range has no slot number.
        On any error none is registered.
    """
    for concept in concepts:  # before the file is locked, since hashing a base can take long
        compare(concept.meta.fingerprint, base.fingerprint)
    with library.together() as joined:
        return [_register(path, concept, base, joined, allow_overlap) for concept in concepts]


def _register(
    path: Path, concept: Concept, base: Base, library: Library, allow_overlap: bool
) -> Entry:
    meta = concept.meta
    if meta.slot is None:
        raise ConfigError(f"{path} has no slot", "train it again with --slot")
    known = entry_of(library, base.key, meta.variant, meta.name)
    if known and (known.start, known.stop) != (meta.start, meta.stop):
        raise ConflictError(
            f"the library has another {meta.name!r}, of indices {known.start} to {known.stop - 1}",
            f"`sbora library remove {meta.name}` first",
        )
    got = library.reserve(
        base.key, meta.variant, meta.name, meta.rank, meta.widths, meta.slot, allow_overlap
    )
    if not got.registered:
        raise ConflictError(
            f"indices {meta.start} to {meta.stop - 1} of {meta.name!r} belong to another concept "
            "in the library",
            "see `sbora library list`; train one of the two again, or pass --allow-overlap",
        )
    token = meta.tokens[0].token if meta.tokens else None
    library.record(base.key, meta.variant, meta.name, path, meta.digest, token)
    entry = entry_of(library, base.key, meta.variant, meta.name)
    assert entry
    return entry


def _run(
    run: Resumable,
    training: ConceptTraining,
    slot: int,
    samples: Samples,
    on_record: Callable[[StepRecord], None] | None,
) -> list[float]:
    steps = training.config.steps
    if samples.due(0, steps) and not run.found and team.leads():
        _draw_samples(training.base, samples, 0)

    def report(record: StepRecord) -> None:
        if on_record:
            on_record(record)
        if samples.due(record.step, steps) and team.leads():
            _draw_samples(training.base, samples, record.step)

    slots = {training.subject.settings.name: slot}
    return [loss for (loss,) in run.run(training, slots, report)]


def _draw_samples(base: Base, samples: Samples, step: int) -> None:
    """All prompts side by side in one picture, always from the same seed."""
    pictures = draw(base, samples.prompts, [samples.seed] * len(samples.prompts))
    sheet = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for column, picture in enumerate(pictures):
        sheet.paste(picture, (column * picture.width, 0))
    prompt = " | ".join(samples.prompts)
    path = samples.folder / f"step_{step:05d}.png"
    save_png(sheet, path, {"prompt": prompt, "seed": samples.seed, "training_step": step})


def _slot_warnings(reservation: Reservation) -> tuple[str, ...]:
    if reservation.registered:
        return ()
    return (
        f"slot {reservation.slot} belongs to another concept: this one is not registered in the "
        "library and cannot be merged with that one",
    )
