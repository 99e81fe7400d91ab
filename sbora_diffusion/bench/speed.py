"""One run of `sbora bench speed`: from a plan to a record."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sbora_diffusion.bench import mixed_batch
from sbora_diffusion.bench.layer import measure_layer
from sbora_diffusion.bench.merging import PIPELINES, measure_merging
from sbora_diffusion.bench.methods import METHODS
from sbora_diffusion.bench.plan import Plan
from sbora_diffusion.bench.settings import WHAT
from sbora_diffusion.bench.shapes import SHAPES
from sbora_diffusion.bench.steps import measure_steps, one_line
from sbora_diffusion.bench.training import measure_training
from sbora_diffusion.records import commit_here, run_of

Progress = Callable[[int, int, str], object]
Record = dict[str, Any]
Part = tuple[tuple[str, ...], Callable[[], Iterator[Record]]]
""" (section, shape) or (section,), and what gives its figures, each time more of them."""

UNITS = {
    "layer": "seconds",
    "step": "seconds",
    "merging": "milliseconds",
    "mixed_batch": "seconds",
    "training": "seconds",
}


def run_speed(
    plan: Plan,
    command: str,
    commit: str | None = None,
    on_step: Progress = lambda *_: None,
    on_part: Callable[[Record], object] = lambda _: None,
) -> Record:
    """Measure all sections of a plan; one that fails, in whatever way, stops no other.

    Args:
        command: as typed, for the record.
        commit: of the code, where there is no checkout.
        on_step: (rounds done, rounds in all, what is measured).
        on_part: called with the record as far as it goes, whenever it has grown.

    Raises:
        ConfigError: there is no commit to name.
    """
    commit, began = commit or commit_here(), time.perf_counter()
    ends = began + (plan.config.limit or float("inf"))
    plan = replace(plan, on_round=_counter(plan, on_step), ends=ends)
    figures: Record = {}
    with _threads(plan.config.threads):

        def record(finished: bool) -> Record:
            run = run_of(command, plan.device, time.perf_counter() - began, commit)
            return {"what": WHAT, **run, "finished": finished, **_about(plan), **figures}

        for _ in _measured(plan, figures):
            on_part(record(finished=False))
        return record(finished=True)


def _about(plan: Plan) -> Record:
    titles = {name: METHODS[name].title for name in plan.methods}
    return {
        "units": UNITS,
        "memory": "the allocator's peak" if plan.on_gpu else "what autograd saves",
        "config": plan.config.model_dump(mode="json"),
        "titles": titles | (mixed_batch.TITLES if "mixed_batch" in plan.sections else {}),
        "absent": plan.absent,
    }


def _measured(plan: Plan, figures: Record) -> Iterator[None]:
    """Fill in the figures, and stop whenever there are more."""
    figures["failed"] = {}
    for place, measure in _parts(plan):
        try:
            plan.time_left()
            for found in measure():
                _put(figures, place, found)
                yield
        except Exception as error:
            figures["failed"][" ".join(place)] = one_line(error)


def _parts(plan: Plan) -> Iterator[Part]:
    for section in plan.sections:
        if section == "layer":
            yield (section,), partial(measure_layer, plan)
        elif section == "training":
            yield (section,), partial(measure_training, plan)
        elif section == "merging":
            for shape in _merged_shapes(plan):
                yield (section, shape), partial(measure_merging, shape, plan)
        else:
            measure = measure_steps if section == "step" else mixed_batch.measure_mixed
            for shape in plan.shapes:
                yield (section, shape), partial(measure, shape, plan)


def _put(figures: Record, place: tuple[str, ...], found: Record) -> None:
    section, *shape = place
    if shape:
        figures.setdefault(section, {})[shape[0]] = found
    else:
        figures[section] = found


def _merged_shapes(plan: Plan) -> list[str]:
    return [shape for shape in plan.shapes if shape in PIPELINES] or ["sd15"]


def rounds_of(plan: Plan) -> int:
    """How many rounds a run has; a batch that takes too long has fewer."""
    config, each = plan.config, plan.config.warm_up + plan.config.rounds
    counts = {
        "layer": config.warm_up + config.layer_rounds,
        "step": sum(len(plan.batches(SHAPES[name])) for name in plan.shapes) * each,
        "merging": 2 * (1 + config.merge_rounds) * len(_merged_shapes(plan)),
        "mixed_batch": len(plan.shapes) * each,
        "training": config.training_steps,
    }
    return sum(counts[name] for name in plan.sections)


def _counter(plan: Plan, on_step: Progress) -> Callable[[str], None]:
    done, total = 0, rounds_of(plan)

    def on_round(note: str) -> None:
        nonlocal done
        done += 1
        on_step(done, total, note)

    return on_round


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
