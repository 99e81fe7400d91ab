"""Second moments of what the adapted layers read, on a concept's own prompts and on generic ones.

They are all that calibrated merging knows of the activations, see `core/calibration.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from torch import Tensor

from sbora_diffusion.core.calibration import Moments, Portion, portion
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.activations import own_prompts, watched
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.pipeline import hears_nothing, sample, told_texts
from sbora_diffusion.diffusion.prompts import spelled
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import ENCODERS, FIRST, read_texts

AT_ONCE = 8
"""Prompts in a batch, which guidance doubles."""
PIXELS = AT_ONCE * 512 * 512
"""Of a batch at most, so that a GPU holds what passes the denoiser beside what is counted."""
PADDING = 0.05
"""How much a position after the prompt's end counts; they outnumber the words by far."""

_READS_TEXT = re.compile(r"\.attn2\.to_[kv]$|\.add_[qkv]_proj$|\.to_add_out$")
"""Of a denoiser's layers, those whose inputs are positions of the texts."""


class CalibrateConfig(BaseModel):
    """What a calibrated merge is measured on, and how it weighs that. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompts: tuple[Annotated[str, StringConstraints(pattern=r"\{\}")], ...] = Field(
        default=(
            "a photo of {}",
            "a picture of {} under water",
            "a drawing of {} on a street",
            "{} on a farm",
            "a close view of {} in the rain",
            "an image of {} next to a chair",
        ),
        min_length=1,
        description="each concept's own, with {} where its token stands",
    )
    generic: int = Field(default=40, ge=1, le=10_000, description="prompts without a concept")
    steps: int = Field(
        default=3, ge=1, le=1000, description="timesteps, spread over the whole schedule"
    )
    guidance: float = Field(default=4.0, gt=1, description="guidance scale of all drawing")
    generic_weight: float = Field(
        default=0.36,
        ge=0,
        description="how much silence on generic prompts counts for each concept, its own being 1",
    )
    gain: float = Field(
        default=1.1,
        gt=0,
        description="factor on every weight λ, which makes up for what silence takes away",
    )
    ridge: float = Field(default=1e-4, gt=0, description="penalty of the update's size, see core")
    refine: int = Field(
        default=0, ge=0, le=100_000, description="steps of the descent after the fit; 0: none"
    )
    refine_rows: int = Field(default=32, ge=1, description="predictions in each of these steps")
    refine_rate: float = Field(default=1e-3, gt=0, description="learning rate of the descent")
    refine_gradient_checkpointing: bool = Field(
        default=False, description="less memory for more time in the descent"
    )
    refine_mixed_precision: Literal["no", "bf16"] = Field(
        default="no", description="what the descent computes in"
    )
    refine_timesteps: int = Field(
        default=10, ge=1, le=1000, description="timesteps at which predictions are learned"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 62, description="picture k uses seed + k")


def own_moments(
    base: Base, concept: Concept, config: CalibrateConfig, report: Callable[[int], None]
) -> dict[str, Tensor]:
    """Moments on a concept's own prompts, of the conditional half of guided drawing.

    Args:
        base: with this concept in it, and no other.
        report: called with the steps that are done, see `own_steps`.

    Returns:
        Layer to (in, in), fp32 on the CPU.

    Raises:
        NonFiniteError: the latents became NaN or infinite.
    """
    return _moments(base, own_prompts(concept, config.prompts), False, config, report)


def generic_moments(
    base: Base, config: CalibrateConfig, report: Callable[[int], None]
) -> dict[str, Tensor]:
    """Moments of the bare base on generic prompts, of both halves of guided drawing.

    Returns and raises as `own_moments` does; for `report` see `generic_steps`.
    """
    return _moments(base, generic_prompts(config.generic, config.seed), True, config, report)


def own_steps(base: Base, config: CalibrateConfig) -> int:
    """What `own_moments` counts up to."""
    return -(-len(config.prompts) // at_once(base)) * config.steps


def generic_steps(base: Base, config: CalibrateConfig) -> int:
    """What `generic_moments` counts up to."""
    return -(-config.generic // at_once(base)) * config.steps


def at_once(base: Base) -> int:
    """Prompts in a batch: what each of them gives does not depend on it."""
    return max(1, min(AT_ONCE, PIXELS // base.resolution**2))


@torch.no_grad()
def _moments(
    base: Base,
    prompts: Sequence[str],
    both_halves: bool,
    config: CalibrateConfig,
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    moments, batch = Moments(), at_once(base)
    for first in range(0, len(prompts), batch):
        rows = [spelled(prompt) for prompt in prompts[first : first + batch]]
        done = first // batch * config.steps

        def after(step: int, done: int = done) -> None:
            report(done + step)

        _draw(base, moments, rows, both_halves, config.seed + first, config, after)
    return moments.means()


def _draw(
    base: Base,
    moments: Moments,
    prompts: list[str],
    both_halves: bool,
    seed: int,
    config: CalibrateConfig,
    after: Callable[[int], None],
) -> None:
    """Draw one batch and count what the layers read."""
    empty, part = [""] * len(prompts), base.kind.denoiser
    texts = _encoded(base, prompts, moments)
    counted = both_halves and not hears_nothing(base)
    for name, value in _encoded(base, empty, moments if counted else Moments()).items():
        texts[f"negative_{name}"] = torch.zeros_like(value) if hears_nothing(base) else value
    weights = _position_weights(base, prompts)[part]
    if both_halves:  # diffusers puts the negative half first
        weights = torch.cat([_position_weights(base, empty)[part], weights])
    layers = {n: x for n, x in target_layers(base.pipeline).items() if n.startswith(f"{part}.")}
    seeds = [seed + k for k in range(len(prompts))]
    with watched(layers, _Counting(moments, {part: weights})):
        sample(base, texts, seeds, config.steps, config.guidance, after)


class _Counting:
    """Counts the last rows of each layer's input; what several layers read is multiplied once.

    Args:
        weights: model → (rows, positions), how much each position of its texts counts.
    """

    def __init__(self, moments: Moments, weights: Mapping[str, Tensor]) -> None:
        self.moments, self.weights = moments, weights
        self._last: tuple[Tensor, Portion] | None = None

    def __call__(self, name: str, x: Tensor) -> None:
        if self._last is None or self._last[0] is not x:
            part = name.partition(".")[0]
            weights = self.weights[part]
            reads_text = part in ENCODERS or _READS_TEXT.search(name)
            rows = x[-len(weights) :]
            self._last = x, portion(rows, weights[-len(rows) :] if reads_text else None)
        self.moments.add(name, self._last[1])


def _encoded(base: Base, texts: list[str], moments: Moments) -> dict[str, Tensor]:
    """What the text encoders say, as diffusers' pipeline takes it; what their layers read is
    counted."""
    layers = target_layers(base.pipeline, "text-encoder")
    with watched(layers, _Counting(moments, _position_weights(base, texts))):
        states, _, *pooled = base.pipeline.encode_prompt(
            **told_texts(base, "prompt", texts),
            device=base.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    told = {"prompt_embeds": states}
    return told | {"pooled_prompt_embeds": pooled[0]} if pooled else told


def _position_weights(base: Base, texts: list[str]) -> dict[str, Tensor]:
    """Model → (B, tokens): 1 up to the text's end, then `PADDING`.

    The denoiser reads the CLIPs' states side by side, and behind them those of an encoder with a
    length of its own.
    """
    here = base.kind.present(base.pipeline)
    masks = {
        e.model: read_texts(base.pipeline, texts, e.model, e.length).attention_mask.float()
        for e in here
    }
    longer = {e.model: e.length for e in base.kind.encoders if e.length}
    nothing = {model: torch.zeros(len(texts), length) for model, length in longer.items()}
    behind = [masks.get(model, nothing[model]) for model in longer]
    masks[base.kind.denoiser] = torch.cat([masks[FIRST], *behind], 1)
    return {model: mask + PADDING * (1 - mask) for model, mask in masks.items()}
