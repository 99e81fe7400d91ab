"""Trainings that die by SIGKILL: at a step, or at one of the system calls of a save.

`endings` runs them in processes with one thread, which fork from one that has loaded a thin base
once. A GPU that was asked for anything cannot be used in a fork: with "spawn" each training is an
interpreter of its own, and those in different folders run at once.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.checkpointing import Checkpointing
from sbora_diffusion.core import checkpoints, storage
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.runtime import Runtime
from sbora_diffusion.group_jobs import train_concepts
from sbora_diffusion.jobs import train_concept
from sbora_diffusion.library import Library
from tests.diffusion.thin_pocket import thin_pocket

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "steps": 4, "copies": 1, "batch_size": 1, "resolution": 32, "warmup_steps": 3, "rank": 2,
    "preservation": 0.0,
}  # fmt: skip
CALLS = ("fsync", "replace", "mkdir", "chmod", "unlink", "rmdir")


@dataclass
class Plan:
    """One training in a folder of its own, with a library of its own.

    Attributes:
        names: one subject trains alone, several in a group.
        step: die when so many steps are done.
        call: die at this call that changes a file, counted from the beginning of the first save.
        device: where it trains, a GPU with deterministic algorithms.
    """

    folder: str
    names: tuple[str, ...] = ("plushbear",)
    config: dict[str, Any] = field(default_factory=dict)
    every: int = 1
    resume: bool = False
    step: int = 0
    call: int = 0
    device: str = "cpu"


@dataclass
class Ending:
    """How a training ended.

    Attributes:
        status: -9 for SIGKILL, else an exit status.
        steps: how many were done, over all trainings in this folder up to now.
        told: what the user was told.
        digests: SHA-256 of the concept files.
        calls: how many calls from the beginning of the first save on changed a file; 0 if killed.
    """

    status: int
    steps: int
    told: list[str]
    digests: list[str]
    calls: int


def endings(plans: Sequence[Plan], method: str = "fork") -> list[Ending]:
    """How trainings end, those of one folder one after another.

    Args:
        method: how their processes are started, "fork" or "spawn".
    """
    finished = subprocess.run(
        [sys.executable, "-m", "tests.reliability.training_kills", method],
        input=json.dumps([asdict(plan) for plan in plans]),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Ending(**ending) for ending in json.loads(finished.stdout.splitlines()[-1])]


def train(
    base: Base, plan: Plan, told: list[str], on_step: Callable[[int], None] = lambda _: None
) -> None:
    """One training in this process."""
    how = Checkpointing(plan.every, plan.resume, told.append, told.append)
    folder, config = Path(plan.folder), TrainConfig(**{**TINY, **plan.config})
    library = Library(folder / "library.sqlite3")
    subjects = [read_subject(ROOT / "concepts" / name) for name in plan.names]
    if len(subjects) > 1:
        train_concepts(
            base, subjects, config, library=library, folder=folder, at_once=len(subjects),
            on_step=lambda step, *_: on_step(step), checkpointing=how,
        )  # fmt: skip
        return
    train_concept(
        base, subjects[0], config, library=library, output=folder / f"{plan.names[0]}.safetensors",
        on_record=lambda record: on_step(record.step), checkpointing=how,
    )  # fmt: skip


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _ended(plan: Plan, context: Any, base: Base | None) -> Ending:
    folder = Path(plan.folder)
    folder.mkdir(exist_ok=True)
    notes = folder / "notes.json"
    notes.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(base, plan, notes))
    process.start()
    process.join()
    noted = json.loads(notes.read_text()) if notes.exists() else {"told": [], "calls": 0}
    done = folder / "steps.txt"
    steps = int(done.read_text()) if done.exists() else 0
    files = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return Ending(process.exitcode, steps, noted["told"], digests, noted["calls"])


def _child(base: Base | None, plan: Plan, notes: Path) -> None:
    base, told = base or _loaded(), []
    calls = Calls(plan.call)

    def on_step(step: int) -> None:
        (notes.parent / "steps.txt").write_text(str(step))
        if plan.step == step:
            _die()

    base.pipeline.to(plan.device)
    base.runtime = Runtime(deterministic=True)
    try:
        with calls.counted():
            train(base, plan, told, on_step)
    finally:
        notes.write_text(json.dumps({"told": told, "calls": calls.count}))


def _loaded() -> Base:
    torch.set_num_threads(1)
    return thin_pocket(load_base("pocket", "cpu"))


class Calls:
    """Counts the calls that change a file, from the beginning of the first save on.

    Args:
        last: die at the call of this number; a write dies halfway, other calls before they act.
    """

    def __init__(self, last: int) -> None:
        self.last, self.count, self.begun = last, 0, False

    def due(self) -> bool:
        self.count += self.begun
        return self.begun and self.count == self.last

    @contextmanager
    def counted(self) -> Iterator[None]:
        make, originals = checkpoints.write_folder, {name: getattr(os, name) for name in CALLS}

        def begin(*args: Any, **options: Any) -> None:
            self.begun = True
            make(*args, **options)

        checkpoints.write_folder = begin
        checkpoints.open = storage.open = self._opened  # type: ignore[attr-defined]
        try:
            for name, call in originals.items():
                setattr(os, name, self._deadly(call))
            yield
        finally:
            checkpoints.write_folder = make
            del checkpoints.open, storage.open  # type: ignore[attr-defined]
            for name, call in originals.items():
                setattr(os, name, call)

    def _deadly(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if self.due():
                _die()
            return call(*args, **options)

        return called

    def _opened(self, file: int | Path, mode: str, *rest: Any) -> Any:
        if mode in ("wb", "xb") and self.due():
            with open(file, mode) as half:
                half.write(b"half of it")
                half.flush()
                _die()
        return open(file, mode, *rest)


def _main(method: str) -> None:
    plans = [Plan(**given) for given in json.load(sys.stdin)]
    context, base = get_context(method), _loaded() if method == "fork" else None
    places = sorted({plan.folder for plan in plans})

    def in_folder(place: str) -> list[Ending]:
        return [_ended(plan, context, base) for plan in plans if plan.folder == place]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        run = map if base else pool.map  # a process with several threads should not fork
        found = dict(zip(places, map(iter, run(in_folder, places)), strict=True))
    print(json.dumps([asdict(next(found[plan.folder])) for plan in plans]))


if __name__ == "__main__":
    _main(sys.argv[1])
