"""How long folding, removing, switching and merging concepts take.

All attention linears and two placeholder vectors a concept. Reading files, and hashing the base
(once, when it is loaded), are not measured; the factors lie on the device.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sbora_diffusion.bench.goals import merge_limits
from sbora_diffusion.bench.plan import Plan
from sbora_diffusion.bench.shapes import SHAPES
from sbora_diffusion.bench.standin import standin, standin_concept
from sbora_diffusion.bench.timing import quartiles, timed
from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.core.functional import VARIANTS, Variant
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.untrained import tiny_unet
from sbora_diffusion.records import at_most

Pipeline = Callable[[torch.Generator, str, torch.dtype], Any]
Action = tuple[str, Callable[[], object]]

PIPELINES: dict[str, Pipeline] = {
    "sd15": standin,
    "tiny": partial(standin, width=32, words=1000, unet_of=tiny_unet),
}
"""Shape → how to make what stands for its pipeline."""

# What takes one concept in or out; everything else moves many.
ONE = (
    "fold_one",
    "remove_one",
    "switch_one_for_one",
    "fold_one_beside",
    "remove_one_of_all",
    "change_one_weight",
)
ALL = ("merge_all", "remove_all")
WHOLE = "merge_all_and_restore_with_new_tables"


@dataclass(frozen=True)
class Merging:
    """A base and the concepts that are folded into it."""

    base: Base
    concepts: Sequence[Weighted]

    def times(self, rounds: int, device: str, on_round: Callable[[], object]) -> dict[str, Any]:
        """Action → seconds of each round; an action begins where the one before it ended."""
        every, merged = list(self.concepts), Merged(self.base)
        merged.switch(every[:1])  # copies the word embeddings, once
        merged.restore()
        name = every[0][0].meta.name
        actions: list[Action] = [
            ("fold_one", partial(merged.switch, every[:1])),
            ("remove_one", partial(merged.switch, [])),
            ("merge_all", partial(merged.switch, every)),
            ("remove_one_of_all", partial(merged.switch, every[:-1])),
            ("fold_one_beside", partial(merged.switch, every)),
            ("change_one_weight", partial(merged.set_weight, name, 0.5)),
            ("remove_all", partial(merged.switch, [])),
            ("switch_one_to", partial(merged.switch, every[:1])),
            ("switch_one_for_one", partial(merged.switch, every[1:2])),
            ("restore", merged.restore),
            (WHOLE, lambda: Merged(self.base, every).restore()),
        ]
        times: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for what, action in actions:
                seconds = timed(action, device)
                if number:  # the first round warms up
                    times.setdefault(what, []).append(seconds)
            on_round()
        return {what: times[what] for what in (*ONE, *ALL, WHOLE)}


def measure_merging(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Both variants on one shape."""
    rank, base = plan.rank(SHAPES[name]), _base(name, plan)
    figures: dict[str, Any] = {}
    for variant in VARIANTS:
        merging = Merging(base, _concepts(base, variant, rank, plan))
        note = f"merging {name}, {variant}"
        times = merging.times(plan.config.merge_rounds, plan.device, partial(plan.on_round, note))
        figures[variant] = _figures(times, merge_limits(name, plan.device))
    title, count = SHAPES[name].title, plan.config.concepts
    yield {"title": title, "concepts": count, "rank": rank, "dtype": plan.dtype, **figures}


def _base(name: str, plan: Plan) -> Base:
    generator = torch.Generator().manual_seed(plan.config.seed)
    pipeline = PIPELINES[name](generator, plan.device, plan.torch_dtype)
    base = Base("stand-in", pipeline, "sd1")
    # Hashing the base is a part of loading it: give the concepts' own fingerprint at once.
    base.__dict__["fingerprint"] = dict.fromkeys(target_layers(pipeline), "0" * 48)
    return base


def _concepts(base: Base, variant: Variant, rank: int, plan: Plan) -> list[Weighted]:
    layers = target_layers(base.pipeline)
    width = base.pipeline.text_encoder.get_input_embeddings().embedding_dim
    return [
        (_on_device(standin_concept(layers, f"{variant}{k}", variant, k, rank, width), plan), 1.0)
        for k in range(plan.config.concepts)
    ]


def _on_device(concept: Concept, plan: Plan) -> Concept:
    layers = {
        name: LayerFactor(layer.indices, layer.factor.to(plan.device))
        for name, layer in concept.layers.items()
    }
    embeddings = {name: rows.to(plan.device) for name, rows in concept.embeddings.items()}
    return Concept(concept.meta, layers, embeddings)


def _figures(
    times: Mapping[str, Sequence[float]], limits: tuple[float, float] | None
) -> dict[str, Any]:
    """Action → median and quartiles in milliseconds, against the limit where there is one."""
    figures = {}
    for what, seconds in times.items():
        each = [1000 * s for s in seconds]
        median = statistics.median(each)
        limit = limits[what in ALL] if limits and what != WHOLE else None
        figure = {"value": round(median, 4)} if limit is None else at_most(median, limit)
        spread = [round(q, 4) for q in quartiles(each)]
        figures[what] = {**figure, "quartiles": spread, "rounds": len(each)}
    return figures
