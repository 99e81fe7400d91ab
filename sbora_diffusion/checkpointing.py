"""Trainings that can be taken up again: when they are saved, what stops them, how they go on."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import team
from sbora_diffusion.core.checkpoints import CheckpointFolder, Content
from sbora_diffusion.core.errors import ConfigError, NonFiniteError, ResourceError, SboraError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.runtime import deterministic
from sbora_diffusion.diffusion.training_loop import StepRecord, TrainingLoop
from sbora_diffusion.identity import departures, environment, identity, refuse_another

_FULL = ("can't allocate memory", "not enough memory")  # what torch says of a CPU's memory


@dataclass(frozen=True)
class Checkpointing:
    """How trainings are saved while they run.

    Attributes:
        every: steps between two checkpoints; 0 for none at all, whatever happens.
        resume: go on from the newest checkpoint of the same output.
        tell, warn: are told, in one line each, what the user should know, and what is amiss.
        keep_last: save the last step too, and leave it to the caller to remove the checkpoints.
    """

    every: int = 0
    resume: bool = False
    tell: Callable[[str], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    keep_last: bool = False

    def due(self, step: int, steps: int) -> bool:
        last = self.keep_last and step == steps
        return 0 < self.every < steps and ((step % self.every == 0 and step < steps) or last)


NONE = Checkpointing()


def checkpoint_folder(output: Path, others: int = 0) -> CheckpointFolder:
    """Where a training's checkpoints lie: beside its concept file.

    Args:
        output: the concept file, the first one of a group.
        others: how many concepts the group has beside it.
    """
    group = f"_and_{others}" if others else ""
    return CheckpointFolder(output.with_name(f"{output.stem}{group}.checkpoints"))


def resumed_slots(
    checkpointing: Checkpointing,
    folders: Iterable[CheckpointFolder],
    wanted: Mapping[str, int] | None,
) -> dict[str, int]:
    """Name → slot: what is wanted, and what the concepts have whose training goes on.

    Raises:
        ConfigError: a training that goes on has another slot than the one that is wanted.
        IntegrityError: all checkpoints of one are damaged.
    """
    slots = dict(wanted or {})
    for folder in folders if checkpointing.resume else ():
        found = folder.newest(lambda _: None)
        for name, had in found.document["slots"].items() if found else ():
            if slots.setdefault(name, had) != had:
                raise ConfigError(
                    f"the checkpoint in {folder.root} is another training's: the slot of {name!r} "
                    f"is {had}, here it is {slots[name]}",
                    "leave out --slot, or start anew without --resume",
                )
    return slots


def discard(checkpointing: Checkpointing, folders: Iterable[CheckpointFolder]) -> None:
    """Remove checkpoints whose concept files are written, unless nothing was to be saved."""
    for folder in folders if checkpointing.every or checkpointing.resume else ():
        folder.remove()


class Resumable:
    """One training, its checkpoints, and what was found of it.

    Args:
        folder: where its checkpoints lie.

    Raises:
        BaseMismatch, ConfigError, DataError: what is to be gone on from is another training's.
        IntegrityError: its checkpoints are damaged, all of them.
    """

    def __init__(
        self,
        checkpointing: Checkpointing,
        folder: CheckpointFolder,
        base: Base,
        subjects: Sequence[Subject],
        config: TrainConfig,
    ) -> None:
        self.how, self.folder, self.base, self.config = checkpointing, folder, base, config
        self.found: Content | None = None
        self.losses: list[tuple[float, ...]] = []
        self._saved = 0
        if checkpointing.every or checkpointing.resume:
            self._identity = identity(base, subjects, config)
            if team.leads():
                folder.sweep()
            self._find()

    def _find(self) -> None:
        place, tell = self.folder.root, self.how.tell
        if not self.how.resume:
            if self.folder.paths():
                tell(f"{place} holds an unfinished training; --resume would go on from there")
            return
        on_cpu = self.base.device.type == "cpu"
        self.found = team.once(lambda: self.folder.newest(self.how.warn), on_cpu)
        if self.found is None:
            tell(f"{place} holds no checkpoint: the training starts at the beginning")
            return
        document = self.found.document
        refuse_another(document["identity"], self._identity, place)
        self._saved = document["step"]
        self.losses = [tuple(losses) for losses in document["losses"]]
        tell(f"going on from step {self._saved} of {self.config.steps}")

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """As many threads as the training had when it began, and a GPU's fixed order where it is
        wanted: both decide how sums are rounded."""
        threads, device = torch.get_num_threads(), self.base.device
        try:
            if self.found:
                self._announce(self.found.document)
            with deterministic(device) if self.base.runtime.deterministic else nullcontext():
                yield
        finally:
            torch.set_num_threads(threads)

    def _announce(self, document: Mapping[str, Any]) -> None:
        had = {"deterministic": False, **document["environment"]}  # the first did not name it
        if had["threads"] != torch.get_num_threads():
            self.how.tell(f"as before, the training takes {had['threads']} threads")
            torch.set_num_threads(had["threads"])
        found = departures(document["identity"], self._identity)
        found += departures(had, environment(self.base))
        if found:
            self.how.warn(f"not bit for bit the training that was begun: {'; '.join(found)}")

    def run(
        self,
        training: TrainingLoop,
        slots: Mapping[str, int],
        on_record: Callable[[StepRecord], None],
    ) -> list[tuple[float, ...]]:
        """Train to the end, saving what is due, and what is done when something stops it.

        Args:
            slots: name → slot of each concept.

        Returns:
            The concepts' losses of each step, those before the checkpoint among them.

        Raises:
            NonFiniteError: says from which step the training can go on.
            ResourceError: memory is full; says what to lower.
        """
        training.resumed = self.found
        try:
            with _stopping_between_steps(wanted=self.how.every > 0) as stopped:
                for record in training.steps():
                    self.losses.append(record.losses)
                    on_record(record)
                    if self.how.due(record.step, record.steps):
                        self._save(training, slots)
                    if stopped.is_set():
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            self._rescue(training, slots)
            self.how.tell(_joined("stopped", self._way_on()))
            raise
        except NonFiniteError as error:
            remedy = _joined(error.remedy, self._way_on())
            raise NonFiniteError(error.problem, remedy) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._rescue(training, slots)
            remedy = _joined(self._what_to_lower(), self._way_on())
            raise ResourceError("memory is full", remedy) from error
        return self.losses

    def finished(self) -> None:
        """Remove the checkpoints: the concept file is written."""
        if not self.how.keep_last and team.leads():
            discard(self.how, [self.folder])

    def _save(self, training: TrainingLoop, slots: Mapping[str, int]) -> None:
        """Add a checkpoint; a full disk does not end the training. The first of several processes
        saves for all, whose states are the same."""
        state = training.state
        assert state
        if not team.leads():
            return
        document, tensors = state.content()
        document |= {
            "identity": self._identity,
            "environment": environment(self.base),
            "slots": dict(slots),
            "losses": self.losses[: state.step],
        }
        try:
            self.folder.write(state.step, Content(document, tensors))
            self._saved = state.step
        except ResourceError as error:
            self.how.warn(f"step {state.step} is not saved: {error}")

    def _rescue(self, training: TrainingLoop, slots: Mapping[str, int]) -> None:
        """Save the last completed step, if it is not saved and can be."""
        state = training.state
        if self.how.every and state and state.whole and state.step > self._saved:
            try:
                self._save(training, slots)
            except (SboraError, MemoryError, RuntimeError) as error:
                self.how.warn(f"step {state.step} is not saved: {error}")

    def _way_on(self) -> str:
        if not self._saved:
            return ""
        return f"step {self._saved} is saved: the same command with --resume goes on from there"

    def _what_to_lower(self) -> str:
        config, base = self.config, self.base
        ways = []
        if config.batch_size > 1:
            half, twice = config.batch_size // 2, config.gradient_accumulation * 2
            ways.append(f"-s batch_size={half} -s gradient_accumulation={twice}")
        if not config.gradient_checkpointing:
            ways.append("-s gradient_checkpointing=true")
        if (config.resolution or base.resolution) > 64:
            ways.append("a lower resolution")
        return f"try {', '.join(ways)} or another --device" if ways else "try another --device"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the machine's memory was full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _FULL)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


@contextmanager
def _stopping_between_steps(wanted: bool) -> Iterator[threading.Event]:
    """Ctrl-C lets the step at hand end, whose state can be saved; a second one does not wait."""
    asked, before = threading.Event(), signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main) or before in (None, signal.SIG_IGN):
        yield asked
        return

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
