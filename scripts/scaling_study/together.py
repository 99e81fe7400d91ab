"""One concept by two processes, and by one with batches of the same size or of half of it."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import team
from sbora_diffusion.bench.pipelines import random_base
from sbora_diffusion.core.concept import Concept, read_concept, write_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.records import at_least, at_most
from scaling_study.figures import distance
from scaling_study.processes import GPUS, ROOT, SCRIPT, TOGETHER, finished, launcher, start

SUBJECT = ROOT / "concepts" / "plushbear"
SHAPES = {"pocket": "the pocket base", "sd1": "Stable Diffusion 1.5, 512 px, random weights"}
WARM_UP, STEPS, PICTURES = 5, 20, 16
"""Steps that are not counted, in which kernels are chosen and work is recorded; steps that are;
pictures of each process."""
GOALS = {"sd1": 0.9}
"""Of the efficiency; pocket's steps are too short for one."""
APART = 0.02
"""How far two concepts may be from each other, in the norm of one: Adam makes rounding visible."""
LIMIT = 240.0
"""Seconds for all shapes with one number of processes."""


def together(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each shape, with one process and with two."""
    for count in (1, GPUS):
        own = ["--measure", str(folder / str(count)), "--device", args.device]
        tiny = ["--tiny"] if args.tiny else []
        command = [*launcher(count, args.device, TOGETHER), str(SCRIPT), *own, *tiny]
        finished(start(f"one concept by {count}", command), LIMIT)
    return {shape: compared(shape, folder) for shape in SHAPES}


def compared(shape: str, folder: Path) -> dict[str, Any]:
    one, two = (json.loads((folder / str(n) / f"{shape}.json").read_text()) for n in (1, GPUS))
    concepts = [read_concept(folder / str(n) / f"{shape}.safetensors") for n in (1, GPUS)]
    efficiency, goal = one["step_seconds"] / two["step_seconds"], GOALS.get(shape)
    return {
        "title": SHAPES[shape],
        "one_process": one,
        "two_processes": two,
        "efficiency": at_least(efficiency, goal) if goal else round(efficiency, 4),
        "difference": at_most(distance(*map(factors, concepts)), APART),
    }


def factors(concept: Concept) -> dict[str, torch.Tensor]:
    return {name: layer.factor for name, layer in concept.layers.items()}


def measure(folder: Path, device: str, tiny: bool) -> None:
    """What one process does: timed steps in bf16, then a concept in fp32."""
    torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    folder.mkdir(exist_ok=True)
    for shape in SHAPES:
        figures = timed(opened(shape, device, "bf16", tiny), tiny)
        concept = trained(opened(shape, device, "fp32", tiny), tiny)
        if team.leads():
            (folder / f"{shape}.json").write_text(json.dumps(figures))
            write_concept(folder / f"{shape}.safetensors", concept)
    team.part()


def opened(shape: str, device: str, dtype: str, tiny: bool) -> Base:
    if shape == "pocket":
        return load_base("pocket", device, dtype)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return random_base(shape, device, kind, tiny)


def timed(base: Base, tiny: bool) -> dict[str, Any]:
    """Steps with as many pictures for each process, however many there are."""
    batch = team.size() * (2 if tiny else PICTURES)
    config = TrainConfig(
        steps=WARM_UP + (1 if tiny else STEPS), batch_size=batch, copies=1, preservation=0.0
    )
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(base.device)
    training = ConceptTraining(base, read_subject(SUBJECT), config, 0)
    try:
        seconds = sorted(record.seconds for record in list(training.steps())[WARM_UP:])
        obstacle = training.obstacle
    finally:
        training.close()
    peak = torch.cuda.max_memory_allocated(base.device) / (1 << 30) if on_gpu else None
    return {
        "pictures_per_process": batch // team.size(),
        "step_seconds": round(seconds[len(seconds) // 2], 5),
        "fastest_and_slowest": [round(seconds[0], 5), round(seconds[-1], 5)],
        "recorded": obstacle is None,
        "peak_gib": peak and round(peak, 3),
    }


def trained(base: Base, tiny: bool) -> Concept:
    """A concept of a few steps; the same pictures whatever the processes."""
    config = TrainConfig(steps=2 if tiny else 5, batch_size=4, copies=1, preservation=0.0)
    training = ConceptTraining(base, read_subject(SUBJECT), config, 0)
    try:
        list(training.steps())
        return training.concept()
    finally:
        training.close()
