"""The processes that the study starts: each in limited time, and what went wrong in one line."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "study_scaling.py"
TOGETHER = ROOT / "scripts" / "accelerate" / "two_gpus.yaml"
DIVIDED = ROOT / "scripts" / "accelerate" / "two_gpus_fsdp2.yaml"
GPUS = 2
"""Processes, each with a GPU."""
THREADS = "4"
"""Of the CPU; launchers would give each of several processes one, and a process alone all."""
FAREWELL = 45.0
"""Seconds in which a launcher ends its processes."""


class Failed(Exception):
    """A run that gave nothing, in one line."""


class Started(NamedTuple):
    """A process at work; what it says beside its result goes to a file, which never fills up."""

    what: str
    process: subprocess.Popen
    said: IO[str]
    began: float


_all: list[Started] = []


def launcher(count: int, device: str, config: Path) -> list[str]:
    """What starts so many processes; a script or `-m` and a module follow."""
    if count == 1:
        return [sys.executable]
    if device == "cpu":  # where accelerate's own launcher starts one process
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        return [sys.executable, "-m", *torchrun]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


def start(what: str, command: Sequence[str], **environment: str) -> Started:
    """Start a process; `finished` waits for it."""
    said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - `finished` closes it
    variables = {"OMP_NUM_THREADS": THREADS} | os.environ | environment
    process = subprocess.Popen(
        command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True
    )
    run = Started(what, process, said, time.monotonic())
    _all.append(run)
    return run


def finished(run: Started, limit: float) -> str:
    """What a process wrote to its standard output.

    Args:
        limit: seconds from its start.

    Raises:
        Failed: it ended with another status than 0, or not in time.
    """
    with run.said:
        try:
            left = max(0.0, run.began + limit - time.monotonic())
            written, _ = run.process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            stop(run.process)
            raise Failed(f"{run.what}: not done in {limit:.0f} s, stopped") from None
        seconds = time.monotonic() - run.began
        print(f"  {run.what}: {seconds:.1f} s", file=sys.stderr, flush=True)
        if run.process.returncode:
            raise Failed(f"{run.what}: status {run.process.returncode}: {_reason(run.said)}")
    return str(written)


def document(written: str) -> dict[str, Any]:
    """The JSON document in an output, to which libraries may have added lines."""
    found, _ = json.JSONDecoder().raw_decode(written[written.index("{") :])
    return dict(found)


def stop(process: subprocess.Popen) -> None:
    """End a process; a launcher ends its own when it is asked to, not when it is killed."""
    process.terminate()
    try:
        process.communicate(timeout=FAREWELL)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def stop_all() -> None:
    """End what nobody waited for."""
    for run in _all:
        if run.process.poll() is None:
            stop(run.process)
    _all.clear()


def _reason(said: IO[str]) -> str:
    """The line that names an error, where there is one; all of it is shown."""
    said.seek(0)
    text = said.read()
    print(text[-4000:], file=sys.stderr, flush=True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line]
    return (errors[:1] or lines[-1:] or ["it said nothing"])[0][:300]
