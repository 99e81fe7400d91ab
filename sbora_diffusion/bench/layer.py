"""One linear layer: forward and backward pass of each method, and the folded forms' write-back."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from sbora_diffusion.bench.contestants import Contestant
from sbora_diffusion.bench.goals import layer_goals
from sbora_diffusion.bench.methods import Site
from sbora_diffusion.bench.plan import Plan
from sbora_diffusion.bench.settings import FLOOR, Mode
from sbora_diffusion.bench.shapes import layer_shape, random_inputs, random_model
from sbora_diffusion.bench.steps import field_of, one_line
from sbora_diffusion.bench.timing import Step, interleaved, summary


def measure_layer(plan: Plan) -> Iterator[dict[str, Any]]:
    """Eager; without optimizer, so that one layer is not all overhead of Python."""
    config = plan.config
    shape = layer_shape(config.layer_width, config.layer_tokens)
    eager = plan.eager()
    base = random_model(shape, plan.device, plan.torch_dtype, config.seed)
    inputs = random_inputs(shape, 1, plan.device, plan.torch_dtype, config.seed)
    with ExitStack() as stack:

        def site(_mode: Mode, model: nn.Module) -> Site:
            return Site(model, shape.targets(model), plan.rank(shape), stack)

        field, failed = field_of(base, eager, site)
        steps: dict[str, Step] = {}
        for key, one in field.items():
            method = key.split()[0]
            one.set_inputs(inputs)
            try:
                one.passes()
            except Exception as error:
                failed[method] = one_line(error)
                continue
            steps |= _steps_of(method, one)
        times = interleaved(
            steps, config.layer_rounds, plan.device, config.warm_up, config.seconds,
            lambda: plan.on_round(shape.title),
        )  # fmt: skip
    methods = {name: summary(seconds, times[FLOOR]) for name, seconds in times.items()}
    yield {
        "title": shape.title,
        "rank": plan.rank(shape),
        "dtype": plan.dtype,
        "methods": methods,
        "goals": layer_goals(plan.device, plan.dtype, config.layer_width, methods),
        "failed": failed,
    }


def _steps_of(method: str, one: Contestant) -> dict[str, Step]:
    def both_passes() -> None:
        one.passes()
        one.forget()

    steps: dict[str, Step] = {method: both_passes}
    if one.adapter.after is not None:
        steps[f"{method}_write_back"] = one.adapter.after
    return steps
