"""What a second GPU gives: one concept trained by two processes, fourteen by two workers.

    python scripts/study_scaling.py --device cuda
    python scripts/study_scaling.py --tiny --device cpu -o /tmp/scale.json      # a rehearsal

Three parts, all by `scripts/accelerate/two_gpus.yaml` or the variables that launchers set:
`together` trains one concept on pocket and in the sizes of Stable Diffusion 1.5 (random weights),
with one process and with two, for the time of a step (16 pictures a GPU, bf16) and for what comes
out (fp32). `workers` trains the fourteen concepts one after another on pocket, by one worker and by
two. `killed` kills one of two workers in the middle, starts it again with --resume, and compares
the files. Writes results/scale.json.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from study_options import command

from sbora_diffusion import team
from sbora_diffusion.bench.pipelines import random_base
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept, read_concept, write_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.records import at_least, at_most, run_of

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "scripts" / "accelerate" / "two_gpus.yaml"
SHAPES = {"pocket": "the pocket base", "sd1": "Stable Diffusion 1.5, 512 px, random weights"}
GPUS, WARM_UP = 2, 5
"""Processes; steps that are not counted, in which kernels are chosen and work is recorded."""
GOALS = {"together": 0.9, "workers": 0.95}
APART = 0.02
"""How far two concepts may be from each other, in the norm of one: Adam makes rounding visible."""


def main() -> None:
    args = arguments()
    if args.measure:
        measure(args)
        return
    began = time.monotonic()
    record: dict[str, Any] = {"what": "one concept on two GPUs, and fourteen on two workers"}
    parts = {"together": together, "workers": workers, "killed": killed}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            record[part] = parts[part](args, Path(folder))
        print(part, json.dumps(record[part]), flush=True)
    record |= run_of(command(), args.device, time.monotonic() - began, args.commit)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def together(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each shape, with one process and with two."""
    for count in (1, GPUS):
        own = ["--measure", str(folder / str(count)), "--device", args.device]
        launch(args, count, [str(Path(__file__)), *own, *(["--tiny"] if args.tiny else [])])
    return {shape: compared(shape, folder) for shape in SHAPES}


def launch(args: argparse.Namespace, count: int, work: list[str]) -> None:
    """Run a script in so many processes."""
    if count == 1:
        starter = [sys.executable]
    elif args.device == "cpu":  # where accelerate's own launcher starts one process
        starter = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        starter += ["--nproc-per-node", str(count)]
    else:
        starter = ["accelerate", "launch", "--config_file", str(CONFIG)]
    subprocess.run([*starter, *work], check=True)


def compared(shape: str, folder: Path) -> dict[str, Any]:
    one, two = (json.loads((folder / str(n) / f"{shape}.json").read_text()) for n in (1, GPUS))
    concepts = [read_concept(folder / str(n) / f"{shape}.safetensors") for n in (1, GPUS)]
    efficiency = one["step_seconds"] / two["step_seconds"]
    return {
        "title": SHAPES[shape],
        "one_process": one,
        "two_processes": two,
        "efficiency": at_least(efficiency, GOALS["together"]),
        "difference": at_most(distance(*concepts), APART),
    }


def distance(one: Concept, other: Concept) -> float:
    """‖B − B′‖ / ‖B‖ over all factors."""
    pairs = [(layer.factor, other.layers[name].factor) for name, layer in one.layers.items()]
    squares = sum((a - b).square().sum().item() for a, b in pairs)
    return (squares / sum(a.square().sum().item() for a, _ in pairs)) ** 0.5


def measure(args: argparse.Namespace) -> None:
    """One process's part of `together`: timed steps in bf16, then a concept in fp32."""
    torch.backends.cudnn.allow_tf32 = False
    count, local = team.size(), int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if args.device == "cuda" else args.device
    folder = args.measure
    folder.mkdir(exist_ok=True)
    for shape in SHAPES:
        figures = timed(opened(shape, device, "bf16", args.tiny), count, args.tiny)
        concept = trained(opened(shape, device, "fp32", args.tiny), args.tiny)
        if team.leads():
            (folder / f"{shape}.json").write_text(json.dumps(figures))
            write_concept(folder / f"{shape}.safetensors", concept)
    team.part()


def opened(shape: str, device: str, dtype: str, tiny: bool) -> Base:
    if shape == "pocket":
        return load_base("pocket", device, dtype)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return random_base(shape, device, kind, tiny)


def timed(base: Base, processes: int, tiny: bool) -> dict[str, Any]:
    """Steps with 16 pictures for each process."""
    batch = processes * (2 if tiny else 16)
    config = TrainConfig(
        steps=WARM_UP + (1 if tiny else 20), batch_size=batch, copies=1, preservation=0.0
    )
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(base.device)
    training = ConceptTraining(base, read_subject(ROOT / "concepts" / "plushbear"), config, 0)
    try:
        seconds = sorted(record.seconds for record in list(training.steps())[WARM_UP:])
        obstacle = training.obstacle
    finally:
        training.close()
    return {
        "pictures_per_process": batch // processes,
        "step_seconds": round(seconds[len(seconds) // 2], 5),
        "recorded": obstacle is None,
        "peak_gib": torch.cuda.max_memory_allocated(base.device) / (1 << 30) if on_gpu else None,
    }


def trained(base: Base, tiny: bool) -> Concept:
    """A concept of a few steps; the same pictures whatever the processes."""
    config = TrainConfig(steps=2 if tiny else 5, batch_size=4, copies=1, preservation=0.0)
    training = ConceptTraining(base, read_subject(ROOT / "concepts" / "plushbear"), config, 0)
    try:
        list(training.steps())
        return training.concept()
    finally:
        training.close()


def workers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All concepts, one after another, by one worker and by two."""
    subjects = sorted(path.parent for path in (ROOT / "concepts").glob("*/concept.toml"))
    subjects = subjects[:2] if args.tiny else subjects
    found = {n: at_work(args, subjects, folder / str(n), n) for n in (1, GPUS)}
    alone, shared = found[1]["slowest_worker_seconds"], found[GPUS]["slowest_worker_seconds"]
    same = [
        read_concept(folder / str(GPUS) / f"{s.name}.safetensors").meta.digest
        == read_concept(folder / "1" / f"{s.name}.safetensors").meta.digest
        for s in subjects
    ]
    return {
        "concepts": len(subjects),
        "one_worker": found[1],
        "two_workers": found[GPUS],
        "efficiency": at_least(alone / (GPUS * shared), GOALS["workers"]),
        "same_files": sum(same),
    }


def at_work(
    args: argparse.Namespace, subjects: list[Path], folder: Path, count: int
) -> dict[str, Any]:
    """Seconds from the start of the processes, and of training in the slowest one."""
    began = time.monotonic()
    started = [start(args, subjects, folder, number, count) for number in range(count)]
    documents = [json.loads(worker.communicate()[0]) for worker in started]
    training = [sum(c["seconds"] for c in _concepts(document)) for document in documents]
    return {
        "wall_seconds": round(time.monotonic() - began, 1),
        "slowest_worker_seconds": round(max(training), 2),
    }


def _concepts(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document.get("concepts") or [document]


def start(
    args: argparse.Namespace,
    subjects: list[Path],
    folder: Path,
    number: int,
    count: int,
    *more: str,
) -> subprocess.Popen:
    """One worker, as a launcher starts it."""
    ranks = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number}
    environment = os.environ | {name: str(value) for name, value in ranks.items()}
    steps = ["--steps", "3", "-s", "batch_size=1", "-s", "copies=1"] if args.tiny else []
    train = [
        sys.executable, "-m", "sbora_diffusion", "train", *map(str, subjects), "--slot", "0",
        "--at-once", "1", "--device", args.device, "-o", str(folder), "--json",
        "--library", str(folder.with_suffix(".sqlite3")), "-s", "preservation=0",
        *(steps or ["--steps", str(args.steps)]), *more,
    ]  # fmt: skip
    return subprocess.Popen(train, env=environment, stdout=subprocess.PIPE, text=True)


def killed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Two workers with two concepts each, one of them killed at its first checkpoint and started
    again; every file must be that of workers which nobody killed."""
    subjects = sorted(path.parent for path in (ROOT / "concepts").glob("*/concept.toml"))[:4]
    every = ["--checkpoint-every", "1" if args.tiny else "20"]
    whole, broken = folder / "whole", folder / "broken"
    for worker in [start(args, subjects, whole, n, GPUS, *every) for n in range(GPUS)]:
        worker.communicate()
    steady, victim = (start(args, subjects, broken, n, GPUS, *every) for n in range(GPUS))
    saved = wait_for_checkpoint(broken, subjects[1].name, victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    again = start(args, subjects, broken, 1, GPUS, *every, "--resume")
    for worker in (steady, again):
        worker.communicate()
    same = [
        (whole / f"{s.name}.safetensors").read_bytes()
        == (broken / f"{s.name}.safetensors").read_bytes()
        for s in subjects
    ]
    return {
        "killed_after_a_checkpoint": saved,
        "status_of_the_second_start": again.returncode,
        "concepts": len(subjects),
        "same_files": at_least(sum(same), len(subjects)),
    }


def wait_for_checkpoint(folder: Path, name: str, worker: subprocess.Popen) -> bool:
    """Whether one was there before the worker ended."""
    while worker.poll() is None:
        if list((folder / f"{name}.checkpoints").glob("[!.]*")):
            return True
        time.sleep(0.02)
    return False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--parts", nargs="+", default=["together", "workers", "killed"],
        choices=["together", "workers", "killed"],
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=150, help="of each worker's concepts")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--record", type=Path, default=ROOT / "results" / "scale.json")
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    main()
