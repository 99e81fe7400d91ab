"""How long it takes to train many concepts at once on the pocket base, from files to factors."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbora_diffusion.bench.goals import training_goals
from sbora_diffusion.bench.plan import OutOfTimeError, Plan
from sbora_diffusion.core.errors import DataError
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson

FOLDER = Path(__file__).parents[2] / "concepts"


def measure_training(plan: Plan) -> Iterator[dict[str, Any]]:
    """The default recipe, all concepts in one batch; the base is loaded before the clock starts.

    Raises:
        DataError: there are not so many concept folders.
        OutOfTimeError: between two steps.
    """
    subjects = _subjects(plan.config.concepts)
    base = load_base("pocket", plan.device)
    config = TrainConfig.model_validate({"steps": plan.config.training_steps})
    begun = time.perf_counter()
    lessons = [Lesson(base, s, config, k * config.rank) for k, s in enumerate(subjects)]
    prepared = time.perf_counter()
    loss = _train(base, lessons, plan)
    seconds = time.perf_counter() - begun
    yield {
        "title": f"{len(subjects)} concepts of pocket in one batch",
        "concepts": len(subjects),
        "steps": config.steps,
        "rank": config.rank,
        "dtype": "fp32",
        "seconds": {"loading": round(prepared - begun, 2), "all": round(seconds, 2)},
        "last_loss": round(loss, 4),
        "goals": training_goals(plan.device, len(subjects), config.steps, seconds),
    }


def _train(base: Base, lessons: list[Lesson], plan: Plan) -> float:
    """The loss of the last step; ends when the factors are on the CPU."""
    training, loss = GroupTraining(base, lessons), float("nan")
    try:
        for record in training.steps():
            loss = record.loss
            plan.on_round(f"{len(lessons)} concepts train")
            _check_time(plan, f"{record.step} of {record.steps} steps were done")
        training.concepts()
        return loss
    finally:
        training.close()


def _check_time(plan: Plan, done: str) -> None:
    try:
        plan.time_left()
    except OutOfTimeError as error:
        raise OutOfTimeError(f"{error}; {done}") from error


def _subjects(count: int) -> list[Subject]:
    found = sorted(FOLDER.glob("*/concept.toml"))[:count]
    if len(found) < count:
        raise DataError(
            f"{len(found)} of {count} concept folders in {FOLDER}", "run it in a checkout"
        )
    return [read_subject(file.parent) for file in found]
