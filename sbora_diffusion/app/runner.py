"""Runs jobs in worker processes: one training and one other job at a time."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.app.job_store import Job, JobStore
from sbora_diffusion.console import INTERRUPTED, OK, PROGRESS_FILE

TICK_SECONDS = 0.3
PATIENCE_SECONDS = 60.0
AGAIN_SECONDS = 10.0
"""A worker that imports may swallow what asks it to end."""
CLOSED = "the app was closed"


@dataclass
class Worker:
    """A process and its job; `asked` is when it was asked to end, `again` when it will be next."""

    job: Job
    process: subprocess.Popen
    asked: float | None = None
    again: float = 0.0


class Runner:
    """Starts what is queued, in the order in which it came, and notes how it ends.

    Several apps may share the folders: the one that holds the lock runs the jobs of all. A worker
    whose app is gone saves its training and ends.

    Args:
        stores: of all people.
        home: holds the lock; working folder of the commands.
    """

    def __init__(self, stores: Iterable[JobStore], home: Path):
        self.stores, self.home = list(stores), home
        self._workers: dict[str, Worker] = {}  # by lane
        self._lock: sqlite3.Connection | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ask the workers to save and end, and wait for them."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(TICK_SECONDS):
            if self._lock or self._acquire():
                self._tick()
        while any(worker.process.poll() is None for worker in self._workers.values()):
            for worker in self._workers.values():
                _ask_to_end(worker)
            time.sleep(TICK_SECONDS)
        for worker in self._workers.values():
            _finish(worker, CLOSED)
        if self._lock:
            self._lock.close()

    def _acquire(self) -> bool:
        """Become the app that runs jobs; what ran under one that is gone is stopped."""
        self.home.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(
            self.home / "running.lock", timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            lock.execute("BEGIN EXCLUSIVE")  # until the connection or this process ends
        except sqlite3.OperationalError:
            lock.close()
            return False
        self._lock = lock
        for job in self._all():
            if job.standing.state == "running":
                job.move(state="stopped", message=CLOSED, ended=time.time())
        return True

    def _all(self) -> list[Job]:
        """Every job, the oldest first."""
        return sorted((job for store in self.stores for job in store.jobs()), key=lambda j: j.id)

    def _tick(self) -> None:
        for lane, worker in list(self._workers.items()):
            if worker.process.poll() is not None:
                _finish(worker)
                del self._workers[lane]
            elif (worker.job.folder / "stop").exists():
                _ask_to_end(worker)
        for job in self._all():
            if job.standing.state != "queued":
                continue
            if (job.folder / "stop").exists():
                job.move(state="stopped", message="", ended=time.time())
            elif _lane(job) not in self._workers:
                self._workers[_lane(job)] = self._begin(job)

    def _begin(self, job: Job) -> Worker:
        job = job.move(state="running", began=time.time())
        environment = {**os.environ, PROGRESS_FILE: str(job.folder / "progress.jsonl")}
        with ExitStack() as files:
            out = files.enter_context((job.folder / "result.json").open("wb"))
            log = files.enter_context((job.folder / "log.txt").open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-m", "sbora_diffusion.app.worker", *job.arguments],
                stdin=subprocess.PIPE, stdout=out, stderr=log, cwd=self.home, env=environment,
                start_new_session=True,
            )  # fmt: skip
        return Worker(job, process)


def _lane(job: Job) -> str:
    """Jobs of one lane run one after the other."""
    return "training" if job.kind == "train" else "other"


def _ask_to_end(worker: Worker) -> None:
    now = time.monotonic()
    if worker.asked is None:
        worker.asked = now
    if now - worker.asked > PATIENCE_SECONDS:
        worker.process.kill()
    elif now >= worker.again:
        worker.again = now + AGAIN_SECONDS
        worker.process.send_signal(signal.SIGINT)


def _finish(worker: Worker, reason: str = "") -> None:
    """Note how a process ended."""
    status = worker.process.wait()
    if worker.process.stdin:
        worker.process.stdin.close()
    if status == OK:
        worker.job.move(state="done", ended=time.time())
    elif status == INTERRUPTED or worker.asked is not None:
        worker.job.move(state="stopped", message=reason, ended=time.time())
    else:
        worker.job.move(state="failed", message=_complaint(worker.job), ended=time.time())


def _complaint(job: Job) -> str:
    """The last error that a command printed."""
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else "its process ended unexpectedly; memory may have been full"
