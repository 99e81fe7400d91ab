"""What the denoiser predicts while a concept alone draws its own prompts, and the base generic
ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.activations import own_prompts
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.moments import CalibrateConfig, at_once
from sbora_diffusion.diffusion.pipeline import draw_latents


class Predictions(NamedTuple):
    """N rows that the denoiser was called with, and what it gave; tensors on the CPU."""

    texts: tuple[str, ...]  # N prompts; "" in the unconditional half of guided drawing
    noised: Tensor  # (N, C, H, W)
    timesteps: Tensor  # (N,)
    predicted: Tensor  # (N, C, H, W)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of all parts, one after another."""
    texts, *tensors = zip(*parts, strict=True)
    return Predictions(sum(texts, ()), *map(torch.cat, tensors))


def own_predictions(
    base: Base, concept: Concept, config: CalibrateConfig, report: Callable[[int], None]
) -> Predictions:
    """What is predicted while a concept's own prompts are drawn, in both halves of guidance.

    Args:
        base: with this concept in it, and no other.
        report: called with the steps that are done, see `own_prediction_steps`.

    Raises:
        NonFiniteError: the latents became NaN or infinite.
    """
    return _heard(base, own_prompts(concept, config.prompts), config, report)


def generic_predictions(
    base: Base, config: CalibrateConfig, report: Callable[[int], None]
) -> Predictions:
    """What the bare base predicts on generic prompts; for `report` see
    `generic_prediction_steps`, raises as `own_predictions` does."""
    return _heard(base, generic_prompts(config.generic, config.seed), config, report)


def own_prediction_steps(base: Base, config: CalibrateConfig) -> int:
    """What `own_predictions` counts up to."""
    return -(-len(config.prompts) // at_once(base)) * config.refine_timesteps


def generic_prediction_steps(base: Base, config: CalibrateConfig) -> int:
    """What `generic_predictions` counts up to."""
    return -(-config.generic // at_once(base)) * config.refine_timesteps


@torch.no_grad()
def _heard(
    base: Base, prompts: Sequence[str], config: CalibrateConfig, report: Callable[[int], None]
) -> Predictions:
    parts, steps, batch = [], config.refine_timesteps, at_once(base)
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        seeds = [config.seed + first + k for k in range(len(rows))]
        done = first // batch * steps

        def after(step: int, done: int = done) -> None:
            report(done + step)

        with _overheard(base.denoiser) as calls:
            draw_latents(base, rows, seeds, steps, config.guidance, on_step=after)
        texts = (*[""] * len(rows), *rows)  # diffusers puts the negative half first
        parts += [Predictions(texts, *call) for call in calls]
    return joined(parts)


@contextmanager
def _overheard(denoiser: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Within, each of its calls: latents, timesteps and prediction, on the CPU."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(
        _denoiser: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any
    ) -> None:
        noised, timestep = inputs or (named["hidden_states"], named["timestep"])
        timesteps = torch.as_tensor(timestep).reshape(-1).cpu().expand(len(noised))
        calls.append((noised.cpu(), timesteps, outputs[0].cpu()))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
