"""Seconds on two processor cores, through the code that users run."""

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recipe_study.plan import PLAIN

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS, draw
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.records import at_most

THREADS = 2
DRAW_SECONDS, STEP_SECONDS = 3.0, 0.6
PROMPT = "a photo of a lion on the beach"


def measure_speed(
    base: Base, subject: Subject, pictures: int = 5, training_steps: int = 12
) -> dict[str, Any]:
    """The section; medians after a warm-up.

    Args:
        base: on the CPU.
    """
    load = os.getloadavg()[0]  # two threads on cores that others use wait for each other
    with threads(THREADS):
        drawn, steps = drawing_seconds(base, pictures), step_seconds(base, subject, training_steps)
    return {
        "threads": THREADS,
        "load_average_before": round(load, 2),
        "base_key": base.key,
        "one_picture_seconds": {
            **at_most(statistics.median(drawn), DRAW_SECONDS),
            "steps": DEFAULT_STEPS,
            "guidance": DEFAULT_GUIDANCE,
            "each": [round(s, 3) for s in drawn],
        },
        "training_step_seconds": {
            **at_most(statistics.median(steps), STEP_SECONDS),
            "batch": PLAIN["batch_size"],
            "concept": subject.settings.name,
            "each": [round(s, 3) for s in steps],
        },
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawing_seconds(base: Base, count: int) -> list[float]:
    """Seconds of each of `count` pictures, drawn one by one after one more."""
    seconds = []
    for seed in range(count + 1):
        began = time.perf_counter()
        draw(base, [PROMPT], [seed])
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def step_seconds(base: Base, subject: Subject, count: int, warm_up: int = 3) -> list[float]:
    """Seconds of each of `count` steps of a training of four pictures a step, after a warm-up."""
    training = ConceptTraining(base, subject, TrainConfig(**PLAIN), start=0)
    try:
        records = itertools.islice(training.steps(), warm_up + count)
        return [record.seconds for record in records][warm_up:]
    finally:
        training.close()
