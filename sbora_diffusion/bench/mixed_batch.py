"""A pass of a batch in which each row has a concept of its own, against the frozen model's.

Each row's concept is folded into weights of its own before the passes that are timed, as it is in
drawing: once for a batch of prompts, for all of its 20 to 50 steps.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.bench.contestants import captured, twin
from sbora_diffusion.bench.goals import mixed_goals
from sbora_diffusion.bench.plan import Plan
from sbora_diffusion.bench.settings import FLOOR, Mode
from sbora_diffusion.bench.shapes import SHAPES, random_inputs, random_model
from sbora_diffusion.bench.steps import figures_of, one_line
from sbora_diffusion.bench.timing import Step, interleaved
from sbora_diffusion.core.allocation import indices_for, slot_range
from sbora_diffusion.core.functional import VARIANTS, Variant
from sbora_diffusion.core.mixed import Bank, stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.core.mixed_weights import folded_weights
from sbora_diffusion.core.updates import Update

_Made = tuple[dict[str, list[Bank]], dict[str, Tensor]]

MIXED = {f"mixed_{variant}": variant for variant in VARIANTS}
TITLES = {name: f"SBoRA-{v.upper()}, a concept of its own in each row" for name, v in MIXED.items()}


def measure_mixed(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Forward passes of one shape, without gradients; a way that fails stops no other."""
    shape, config, left = SHAPES[name], plan.config, plan.time_left()
    rows, rank = config.mixed_rows, plan.rank(shape)
    base = random_model(shape, plan.device, plan.torch_dtype, config.seed)
    layers = shape.targets(base)
    inputs = random_inputs(shape, rows, plan.device, plan.torch_dtype, config.seed)
    ready: dict[str, Step] = {}
    failed: dict[str, str] = {}
    made: dict[str, _Made] = {}

    def fail(key: str, error: Exception) -> None:
        failed[key] = one_line(error)

    with ExitStack() as stack:
        for way, mode in [(way, mode) for mode in config.modes for way in (FLOOR, *MIXED)]:
            try:
                model = twin(base)
                if way != FLOOR:
                    found = {layer: model.get_submodule(layer) for layer in layers}
                    if way not in made:  # its modes share them, as they share the base's weights
                        banks = _banks(found, MIXED[way], rows, rank)
                        made[way] = banks, folded_weights(found, banks)
                    banks, weights = made[way]
                    stack.enter_context(mixed_rows(found, banks, weights=weights))
                ready[f"{way} {mode}"] = _pass(model, inputs, mode)
            except Exception as error:
                fail(f"{way} {mode}", error)
        times = interleaved(
            ready, config.rounds, plan.device, config.warm_up, min(config.seconds, left),
            lambda: plan.on_round(f"{name}, {rows} concepts in one batch"), fail,
        )  # fmt: skip
    methods = figures_of(times, {})
    yield {
        "title": shape.title,
        "rows": rows,
        "rank": rank,
        "dtype": plan.dtype,
        "layers": len(layers),
        "folded_before": min((len(weights) for _, weights in made.values()), default=0),
        "methods": methods,
        "goals": mixed_goals(name, plan.device, rows, methods),
        "failed": failed,
    }


def _pass(model: nn.Module, inputs: list[Tensor], mode: Mode) -> Step:
    """A forward pass that has run once."""
    call: Callable[..., Tensor] = model
    if mode == "compiled":
        call = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def forward() -> None:
        call(*inputs)

    forward()
    return captured(forward, None) if mode == "graphs" else forward


def _banks(
    layers: dict[str, nn.Module], variant: Variant, rows: int, rank: int
) -> dict[str, list[Bank]]:
    """Random concepts, row k's in slot k of each layer."""
    return {name: [_bank(name, layer, variant, rows, rank)] for name, layer in layers.items()}


def _bank(name: str, layer: Any, variant: Variant, rows: int, rank: int) -> Bank:
    generator = torch.Generator().manual_seed(0)
    form, axis = list(layer.weight.shape), 1 if variant == "fa" else 0
    width, form[axis] = form[axis], rank
    entries = []
    for slot in range(rows):
        factor = 0.01 * torch.randn(form, generator=generator)
        indices = indices_for(name, width, *slot_range(slot, rank), 0)
        entries.append([Update(str(slot), variant, indices, factor, 1.0)])
    return stacked(variant, entries, tuple(layer.weight.shape), layer.weight)
