"""Concepts shared out to independent workers, none of whom waits for another."""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.records import at_least
from scaling_study.figures import distance
from scaling_study.processes import GPUS, ROOT, Failed, Started, document, finished, start
from scaling_study.together import factors

GOAL = 0.95
LIMIT = 240.0
"""Seconds for what one worker does."""
SUBJECTS = sorted(path.parent for path in (ROOT / "concepts").glob("*/concept.toml"))


def workers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All concepts, one after another, by one worker and by two."""
    subjects = SUBJECTS[:2] if args.tiny else SUBJECTS
    one, two = (at_work(args, subjects, folder / str(n), n) for n in (1, GPUS))
    alone, shared = one["slowest_worker_seconds"], two["slowest_worker_seconds"]
    found = compared(folder / "1", folder / str(GPUS), subjects)
    return {
        "concepts": len(subjects),
        "steps_of_each": steps(args),
        "one_worker": one,
        "two_workers": two,
        "efficiency": at_least(alone / (GPUS * shared), GOAL),
        "wall_speedup": round(one["wall_seconds"] / two["wall_seconds"], 3),
        **found,
    }


def at_work(
    args: argparse.Namespace, subjects: list[Path], folder: Path, count: int
) -> dict[str, Any]:
    """Seconds from the start of the processes, and of training in the slowest one."""
    began = time.monotonic()
    started = [worker(args, subjects, folder, number, count) for number in range(count)]
    documents = [document(finished(run, LIMIT)) for run in started]
    wall = time.monotonic() - began
    training = [[c["seconds"] for c in _concepts(found)] for found in documents]
    return {
        "wall_seconds": round(wall, 1),
        "slowest_worker_seconds": round(max(map(sum, training)), 2),
        "seconds_of_each_concept": training,
    }


def _concepts(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found.get("concepts") or [found]


def steps(args: argparse.Namespace) -> int:
    return 3 if args.tiny else int(args.steps)


def worker(
    args: argparse.Namespace,
    subjects: list[Path],
    folder: Path,
    number: int,
    count: int,
    *more: str,
) -> Started:
    """One worker, as a launcher starts it."""
    ranks = {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number)}
    tiny = ["-s", "batch_size=1", "-s", "copies=1"] if args.tiny else []
    train = [
        sys.executable, "-m", "sbora_diffusion", "train", *map(str, subjects), "--slot", "0",
        "--at-once", "1", "--device", args.device, "-o", str(folder), "--json",
        "--library", str(folder.with_suffix(".sqlite3")), "-s", "preservation=0",
        "--steps", str(steps(args)), *tiny, *more,
    ]  # fmt: skip
    return start(f"{len(subjects)} concepts, worker {number + 1} of {count}", train, **ranks)


def compared(one: Path, other: Path, subjects: list[Path]) -> dict[str, Any]:
    """How many files two folders share, byte for byte, and how far the others are apart."""
    files = [(one / f"{s.name}.safetensors", other / f"{s.name}.safetensors") for s in subjects]
    apart = [distance(*(factors(read_concept(file)) for file in pair)) for pair in files]
    return {
        "same_files": sum(a.read_bytes() == b.read_bytes() for a, b in files),
        "farthest_apart": round(max(apart), 6),
    }


def killed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Two workers with two concepts each, one of them killed at its first checkpoint and started
    again; every file must be that of workers which nobody killed."""
    subjects = SUBJECTS[:4]
    options = ["--checkpoint-every", "1" if args.tiny else "20"]
    if args.device != "cpu":
        options.append("--deterministic")  # else a GPU adds in an order of its own each time
    whole, broken = folder / "whole", folder / "broken"
    for run in [worker(args, subjects, whole, n, GPUS, *options) for n in range(GPUS)]:
        finished(run, LIMIT)
    steady, victim = (worker(args, subjects, broken, n, GPUS, *options) for n in range(GPUS))
    saved = wait_for_checkpoint(broken, subjects[1].name, victim.process)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.communicate()
    if victim.process.returncode != -signal.SIGKILL:
        raise Failed(f"{victim.what} ended before it was killed")
    again = worker(args, subjects, broken, 1, GPUS, *options, "--resume")
    for run in (steady, again):
        finished(run, LIMIT)
    found = compared(whole, broken, subjects)
    return {
        "killed_after_a_checkpoint": saved,
        "concepts": len(subjects),
        **found,
        "same_files": at_least(found["same_files"], len(subjects)),
    }


def wait_for_checkpoint(folder: Path, name: str, process: subprocess.Popen) -> bool:
    """Whether one was there before the worker ended."""
    while process.poll() is None:
        if list((folder / f"{name}.checkpoints").glob("[!.]*")):
            return True
        time.sleep(0.02)
    return False
