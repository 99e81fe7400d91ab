"""Jobs on disk: what was asked for, how far it is, what came out. A job is one `sbora` command.

A job is a folder: `job.json` says what it is and never changes, `state.json` how it stands,
`progress.jsonl` grows while it runs, `result.json` and `log.txt` are what the command printed. The
file `stop` asks whoever runs the job to end it.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sbora_diffusion.app.shown import shown_command
from sbora_diffusion.core.errors import ConfigError, ResourceError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.storage import write_atomically
from sbora_diffusion.core.temporaries import sweep

State = Literal["queued", "running", "done", "stopped", "failed"]
MAX_WAITING = 8
"""Jobs of one person that wait or run."""
KEPT = 50
"""Jobs that stay in the list."""
OPEN: tuple[State, ...] = ("queued", "running")
_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Standing:
    """How a job stands; `began` and `ended` are seconds since the epoch."""

    state: State = "queued"
    message: str = ""
    resumed: bool = False
    began: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        kind: the command's name, e.g. "train".
        words: its arguments, from the command's name on.
        product: the file or folder that it makes.
    """

    id: str
    kind: str
    title: str
    words: tuple[str, ...]
    product: str
    folder: Path
    standing: Standing

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shown_command(["sbora", *self.words])

    @property
    def arguments(self) -> list[str]:
        """As the worker is called."""
        resume = ["--resume"] if self.standing.resumed else []
        return [*self.words, *resume, "--json"]

    @property
    def can_resume(self) -> bool:
        """Whether it ended early and its training was saved, or it can simply run again."""
        return self.standing.state in ("stopped", "failed")

    @property
    def is_open(self) -> bool:
        return self.standing.state in OPEN

    def result(self) -> dict[str, Any]:
        """What the command printed with `--json`; empty if there is nothing yet."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def progress(self) -> list[dict[str, Any]]:
        """All reports of progress so far, in order."""
        try:
            lines = (self.folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def move(self, **changes: Any) -> "Job":
        """The job in another state, noted on disk."""
        standing = Standing(**{**asdict(self.standing), **changes})
        write_atomically(self.folder / "state.json", json.dumps(asdict(standing)).encode())
        return _replaced(self, standing)


class JobStore:
    """All jobs of one person, as the disk has them: every process sees the same.

    Args:
        folder: holds a folder for each job.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def submit(self, kind: str, title: str, words: Sequence[str], product: Path | str = "") -> Job:
        """Put a command into the queue.

        Raises:
            ResourceError: too many wait already, or nothing can be written.
        """
        if sum(job.is_open for job in self.jobs()) >= MAX_WAITING:
            raise ResourceError(
                f"{MAX_WAITING} jobs are waiting or running already",
                "wait until one has ended, or stop one",
            )
        name = f"{time.time_ns():016x}-{secrets.token_hex(4)}"
        facts = {"kind": kind, "title": title, "words": list(words), "product": str(product)}

        def fill(unfinished: Path) -> None:
            (unfinished / "job.json").write_text(json.dumps(facts), encoding="utf-8")
            (unfinished / "state.json").write_text(json.dumps(asdict(Standing())))

        write_folder(self.folder / name, fill)
        self._drop_old()
        return self.get(name)

    def jobs(self) -> list[Job]:
        """All of them, the newest first."""
        if not self.folder.is_dir():
            return []
        names = [f.name for f in self.folder.iterdir() if _ID.fullmatch(f.name)]
        found = (self._read(name) for name in sorted(names, reverse=True))
        return [job for job in found if job]

    def get(self, name: str) -> Job:
        """One of them.

        Raises:
            ConfigError: there is no such job.
        """
        job = self._read(name) if _ID.fullmatch(name or "") else None
        if job is None:
            raise ConfigError("this job is not here any more", "choose another one")
        return job

    def stop(self, name: str) -> None:
        """Ask for its end; what a training has learned is saved."""
        job = self.get(name)
        if job.is_open:
            (job.folder / "stop").touch()

    def resume(self, name: str) -> Job:
        """Put an ended job into the queue again; a training goes on where it was saved."""
        job = self.get(name)
        if not job.can_resume:
            raise ConfigError(f"this job is {job.standing.state}", "only ended ones can go on")
        (job.folder / "stop").unlink(missing_ok=True)
        return job.move(state="queued", message="", resumed=job.kind == "train", ended=None)

    def forget(self, name: str) -> None:
        """Take an ended job out of the list; what it made stays."""
        job = self.get(name)
        if not job.is_open:
            shutil.rmtree(job.folder, ignore_errors=True)

    def _read(self, name: str) -> Job | None:
        folder = self.folder / name
        try:
            facts = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            standing = Standing(**json.loads((folder / "state.json").read_text()))
            facts["words"] = tuple(facts["words"])
            return Job(id=name, folder=folder, standing=standing, **facts)
        except (OSError, ValueError, TypeError, KeyError):
            return None  # being removed, or damaged: it is not shown

    def _drop_old(self) -> None:
        sweep(self.folder)
        for job in self.jobs()[KEPT:]:
            if not job.is_open:
                shutil.rmtree(job.folder, ignore_errors=True)


def _replaced(job: Job, standing: Standing) -> Job:
    return Job(job.id, job.kind, job.title, job.words, job.product, job.folder, standing)
