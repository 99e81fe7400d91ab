"""Training steps of all methods on one model: time, memory, and what a method stores."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sbora_diffusion.bench.contestants import Contestant, contestant, sizes
from sbora_diffusion.bench.goals import batch_goals, size_goals
from sbora_diffusion.bench.memory import peak_bytes
from sbora_diffusion.bench.methods import METHODS, Site
from sbora_diffusion.bench.plan import Plan
from sbora_diffusion.bench.settings import FLOOR, Mode
from sbora_diffusion.bench.shapes import SHAPES, random_inputs, random_model
from sbora_diffusion.bench.timing import Times, interleaved, median_ratio, summary

Field = Mapping[str, Contestant]
""" "<method> <mode>" → contestant."""


def measure_steps(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """One shape: what is known after each batch size. A method that fails, in whatever way, is
    recorded with its reason and stops no other.

    Raises:
        OutOfTimeError: before another batch size.
    """
    shape, config = SHAPES[name], plan.config
    base = random_model(shape, plan.device, plan.torch_dtype, config.seed)
    layers, rank = shape.targets(base), plan.rank(shape)
    with ExitStack() as stack:
        stack.enter_context(_many_compilations("compiled" in config.modes))

        def site(mode: Mode, model: nn.Module) -> Site:
            return Site(model, layers, rank, stack, capturable=mode == "graphs")

        field, failed = field_of(base, plan, site)
        batches: dict[str, Any] = {}
        for batch in plan.batches(shape):
            plan.time_left()
            batches[str(batch)] = _measure_batch(name, batch, plan, field)
            yield {
                "title": shape.title,
                "layers": len(layers),
                "rank": rank,
                "dtype": plan.dtype,
                **_stored(name, field, config.modes[0]),
                "batches": batches,
                "failed": failed,
            }


def _stored(shape: str, field: Field, mode: Mode) -> dict[str, Any]:
    """What the methods store that have taken a step."""
    adapters = {
        key.split()[0]: sizes(one.adapter)
        for key, one in field.items()
        if one.mode == mode and (one.adapter.optimizer is None or one.adapter.optimizer.state)
    }
    return {"adapters": adapters, "goals": size_goals(shape, adapters)}


def field_of(
    base: nn.Module, plan: Plan, site: Any
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Every method in every mode, and why some could not be put on the model.

    Args:
        site: (mode, twin of the base) → where a method is put.
    """
    field: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    for method in plan.methods:
        for mode in plan.config.modes:
            if mode == "graphs" and METHODS[method].no_graph:
                failed[f"{method} {mode}"] = f"not possible: {METHODS[method].no_graph}"
                continue
            try:
                field[f"{method} {mode}"] = contestant(base, method, partial(site, mode), mode)
            except Exception as error:
                failed[f"{method} {mode}"] = one_line(error)
    return field, failed


def _measure_batch(shape: str, batch: int, plan: Plan, field: Field) -> dict[str, Any]:
    """Time and memory at one batch size."""
    config = plan.config
    inputs = random_inputs(SHAPES[shape], batch, plan.device, plan.torch_dtype, config.seed)
    pool = _pool(plan)
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}

    def fail(key: str, error: Exception) -> None:
        failed[key] = one_line(error)
        field[key].forget()
        _tidy(plan)

    for key, one in field.items():
        try:
            left = plan.time_left()
            peaks[key] = _rehearsed(one, inputs, pool, plan)
        except Exception as error:
            fail(key, error)
            pool = _pool(plan)  # a capture that failed may not have let go of its own
        _tidy(plan)
    ready = {key: field[key].step for key in peaks}
    times: Times = {}
    if ready:
        note = f"{shape}, batch {batch}"
        times = interleaved(
            ready, config.rounds, plan.device, config.warm_up, min(config.seconds, left),
            lambda: plan.on_round(note), fail,
        )  # fmt: skip
    methods = figures_of(times, peaks)
    goals = batch_goals(shape, plan.device, batch, methods, times)
    return {"methods": methods, "goals": goals, "failed": failed}


def _pool(plan: Plan) -> Any:
    return torch.cuda.graph_pool_handle() if "graphs" in plan.config.modes else None


def _rehearsed(one: Contestant, inputs: Any, pool: Any, plan: Plan) -> int | None:
    """Take two steps, which compile and make the optimizer's state; the peak of a third.

    None where it cannot be seen: a graph owns its memory, and compiled code on the CPU saves what
    no hook is shown.
    """
    one.set_inputs(inputs, pool)
    one.step()
    one.step()
    if one.mode == "graphs" or (one.mode == "compiled" and not plan.on_gpu):
        return None
    return peak_bytes(one.step, one.model, plan.device)


def figures_of(times: Times, peaks: Mapping[str, int | None]) -> dict[str, Any]:
    """Method → mode → figures, and each method at its best against the floor at its best.

    Without the floor's time in a mode there are no figures of it.
    """
    methods: dict[str, Any] = {}
    for key, seconds in times.items():
        method, mode = key.split()
        floor = f"{FLOOR} {mode}"
        if floor not in times:
            continue
        figures = summary(seconds, times[floor])
        peak, least = peaks.get(key), peaks.get(floor)
        if peak is not None and least:
            figures |= {"peak_bytes": peak, "peak_over_floor": round(peak / least, 4)}
        methods.setdefault(method, {})[mode] = figures
    if FLOOR in methods:
        fastest = {name: _fastest(modes) for name, modes in methods.items()}
        least_time = times[f"{FLOOR} {fastest[FLOOR]}"]
        for name, mode in fastest.items():
            ratio = round(median_ratio(times[f"{name} {mode}"], least_time), 4)
            methods[name]["at_best"] = {"mode": mode, "over_floor": ratio}
    return methods


def _fastest(modes: Mapping[str, Any]) -> str:
    return min(modes, key=lambda mode: modes[mode]["median"])


def one_line(error: Exception) -> str:
    """What went wrong, in at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def _tidy(plan: Plan) -> None:
    gc.collect()
    if plan.on_gpu:
        torch.cuda.empty_cache()


@contextmanager
def _many_compilations(wanted: bool) -> Iterator[None]:
    """Contestants share their code, of which torch compiles only a few versions by default."""
    if not wanted:
        yield
        return
    from torch import _dynamo

    with _dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
    _dynamo.reset()
