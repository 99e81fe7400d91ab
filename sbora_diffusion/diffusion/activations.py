"""What goes into the adapted layers while the model draws a concept's own prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.crosstalk import Crosstalk, UpdateEnergy, from_norms
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.folded_set import concept_updates
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, StepCallback, draw_latents
from sbora_diffusion.diffusion.targets import target_layers

BATCH = 4


class ProbeConfig(BaseModel):
    """Which activations crosstalk is measured on. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = Field(
        (
            "a photo of {}",
            "a photo of {} on the beach",
            "a photo of {} in a kitchen",
            "a drawing of {} in the snow",
        ),
        min_length=1,
        description="each with {} where the concept's token stands",
    )
    steps: int = Field(5, ge=1, le=1000, description="timesteps, spread over the whole schedule")
    seed: int = Field(0, ge=0, lt=1 << 63, description="picture k uses seed + k")


@contextmanager
def watched(layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, `see(name, x)` gets the input (..., in) of each layer whenever it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: see(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_crosstalk(
    base: Base,
    concepts: Sequence[tuple[Concept, float]],
    names: Sequence[str],
    config: ProbeConfig,
    on_step: StepCallback | None = None,
) -> Crosstalk:
    """Crosstalk of every two concepts, on the activations of each concept's own prompts.

    For each concept p the model, with p alone attached, draws p's prompts in a few steps without
    guidance: the text encoder's inputs are those prompts, the UNet's are latents at every noise
    level under them. Prompts are padded as always, and the padding counts, since the UNet reads it.

    Args:
        base: unadapted; it is left as it was.
        concepts: with their weights λ, which scale their updates.
        names: what the concepts are called in the result; unlike their own, they must differ.
        on_step: called with (concepts' steps done, steps in all).

    Raises:
        BaseMismatch, ConflictError, FormatError: a concept does not fit the base, or its file holds
            more than can be applied.
        NonFiniteError: the latents became NaN or infinite.
    """
    for concept, _ in concepts:
        compare(concept.meta.fingerprint, base.fingerprint)
    each = _steps_of_one(config)
    norms: list[dict[tuple[int, str], float]] = []

    def report(done: int) -> None:
        if on_step:
            on_step(len(norms) * each + done, len(concepts) * each)

    for concept, weight in concepts:
        pipeline = ConceptPipeline(base)
        pipeline.add(concept, weight)
        try:
            norms.append(
                _norms(base, own_prompts(concept, config.prompts), concepts, config, report)
            )
        finally:
            pipeline.remove(concept.meta.name)
    return from_norms(names, norms)


def _norms(
    base: Base,
    prompts: Sequence[str],
    concepts: Sequence[tuple[Concept, float]],
    config: ProbeConfig,
    report: Callable[[int], None],
) -> dict[tuple[int, str], float]:
    """(q, layer) → ‖ΔW_q X‖, X being what the layer gets while these prompts are drawn."""
    energies: dict[str, dict[int, UpdateEnergy]] = {}
    for q, pair in enumerate(concepts):
        for layer, update in concept_updates(*pair).items():
            energies.setdefault(layer, {})[q] = UpdateEnergy(update)

    def see(layer: str, x: Tensor) -> None:
        for energy in energies[layer].values():
            energy.add(x)

    layers = target_layers(base.pipeline)
    with watched({name: layers[name] for name in energies}, see):
        _run(base, prompts, config, report)
    return {
        (q, layer): energy.norm()
        for layer, found in energies.items()
        for q, energy in found.items()
    }


def _run(
    base: Base, prompts: Sequence[str], config: ProbeConfig, report: Callable[[int], None]
) -> None:
    for first in range(0, len(prompts), BATCH):
        rows = prompts[first : first + BATCH]
        done = first // BATCH * config.steps
        seeds = [config.seed + first + k for k in range(len(rows))]
        after = partial(_report_after, report, done)
        draw_latents(base, rows, seeds, config.steps, guidance=1.0, on_step=after)


def _report_after(report: Callable[[int], None], done: int, step: int) -> None:
    report(done + step)


def _steps_of_one(config: ProbeConfig) -> int:
    return -(-len(config.prompts) // BATCH) * config.steps


def own_prompts(concept: Concept, prompts: Sequence[str]) -> list[str]:
    """Prompts with the concept's tokens, or its class noun if it has none, in the place of {}."""
    words = " ".join(entry.token for entry in concept.meta.tokens) or concept.meta.class_noun
    return [prompt.replace("{}", words) for prompt in prompts]
