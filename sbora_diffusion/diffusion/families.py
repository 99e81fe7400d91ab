"""Model families, one row each: what a pipeline consists of, and what its denoiser is told.

A new family is a row of `FAMILIES`, its attention layers in `targets.py`, and at most a way to join
what its text encoders say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.noise import FlowObjective, Objective

T5_TOKENS = 256
"""That diffusers' pipeline of Stable Diffusion 3 reads."""


@dataclass(frozen=True)
class Encoder:
    """One text encoder.

    Attributes:
        model, tokenizer: their names in the pipeline.
        layer: which hidden state is read, -1 for the last one behind its norm.
        trained: whether placeholders are learned through it; in others they stay what the class
            noun is there.
        length: how many tokens are read; by default as many as the tokenizer says.
    """

    model: str = "text_encoder"
    tokenizer: str = "tokenizer"
    layer: int = -1
    trained: bool = True
    length: int | None = None


class Told(NamedTuple):
    """What a denoiser is told of a batch of texts."""

    states: Tensor  # (B, tokens, dim)
    pooled: Tensor | None = None  # (B, dim)


Read = tuple[Tensor, Tensor | None]
"""What one encoder makes of texts: states (B, tokens, dim) and, if it projects, (B, dim)."""


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        pipeline: of diffusers.
        checkpoints: what diffusers calls single files of this family.
        width: of the text states, where that tells families of one pipeline apart.
        encoders: in the order in which they are joined.
        join: their outputs, and the denoiser's configuration → what the denoiser is told.
        call: (denoiser, noised latents, timesteps, told, pixels a side of one latent) → its
            prediction.
        objective: what is predicted; its details come from the pipeline's scheduler.
        denoiser: its name in the pipeline.
        half_vae: whether the autoencoder works in fp16.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    checkpoints: tuple[str, ...]
    width: int | None
    encoders: tuple[Encoder, ...]
    join: Callable[[Sequence[Read], Any], Told]
    call: Callable[[nn.Module, Tensor, Tensor, Told, int], Tensor]
    objective: type[Objective] = Objective
    denoiser: str = "unet"
    half_vae: bool = True

    def present(self, pipeline: Any) -> tuple[Encoder, ...]:
        """The encoders that a pipeline has: of Stable Diffusion 3's, T5 may be left out."""
        return tuple(e for e in self.encoders if getattr(pipeline, e.model, None) is not None)

    def reads(self, encoder: Encoder, model: nn.Module, ids: Tensor) -> Read:
        """What an encoder makes of token ids (B, tokens)."""
        if encoder.layer == -1:
            return model(ids)[0], None
        output = model(ids, output_hidden_states=True)
        pooled = output[0] if output[0].dim() == 2 else None
        return output.hidden_states[encoder.layer], pooled


def _alone(read: Sequence[Read], _config: Any) -> Told:
    return Told(read[0][0])


def _side_by_side(read: Sequence[Read], _config: Any) -> Told:
    """Stable Diffusion XL (arXiv 2307.01952, section 2.1): states joined, the second's pooled."""
    return Told(torch.cat([states for states, _ in read], -1), read[-1][1])


def _one_after_another(read: Sequence[Read], config: Any) -> Told:
    """Stable Diffusion 3 (arXiv 2403.03206, section 4): both CLIPs side by side, padded to the
    width of T5, whose states follow; zeros without one, as in diffusers."""
    (first, pooled), (second, also), *more = read
    assert pooled is not None and also is not None
    clip = torch.cat([first, second], -1)
    clip = F.pad(clip, (0, config.joint_attention_dim - clip.shape[-1]))
    empty = clip.new_zeros(len(clip), T5_TOKENS, clip.shape[-1])
    behind = more[0][0] if more else empty
    return Told(torch.cat([clip, behind.to(clip)], -2), torch.cat([pooled, also], -1))


def _unet(unet: nn.Module, noised: Tensor, timesteps: Tensor, told: Told, _scale: int) -> Tensor:
    return unet(noised, timesteps, told.states).sample


def _sized_unet(
    unet: nn.Module, noised: Tensor, timesteps: Tensor, told: Told, scale: int
) -> Tensor:
    """Told that the picture had its size before and was not cut, as when pictures are drawn."""
    height, width = (scale * side for side in noised.shape[-2:])
    sizes = (height, width, 0, 0, height, width)
    columns = [noised.new_full((len(noised), 1), size) for size in sizes]
    added = {"text_embeds": told.pooled, "time_ids": torch.cat(columns, 1)}
    return unet(noised, timesteps, told.states, added_cond_kwargs=added).sample


def _transformer(
    model: nn.Module, noised: Tensor, timesteps: Tensor, told: Told, _scale: int
) -> Tensor:
    return model(noised, told.states, told.pooled, timesteps).sample


_CLIP = (Encoder(),)
_TWO_CLIPS = (Encoder(layer=-2), Encoder("text_encoder_2", "tokenizer_2", -2))
_T5 = Encoder("text_encoder_3", "tokenizer_3", trained=False, length=T5_TOKENS)

FAMILIES = (
    Family("pocket", StableDiffusionPipeline, (), 192, _CLIP, _alone, _unet),
    Family("sd1", StableDiffusionPipeline, ("v1",), 768, _CLIP, _alone, _unet),
    Family("sd2", StableDiffusionPipeline, ("v2",), 1024, _CLIP, _alone, _unet),
    Family(
        "sdxl", StableDiffusionXLPipeline, ("xl_base",), None, _TWO_CLIPS, _side_by_side,
        _sized_unet, half_vae=False,
    ),
    Family(
        "sd3", StableDiffusion3Pipeline, ("sd3", "sd35_medium", "sd35_large"), None,
        (*_TWO_CLIPS, _T5), _one_after_another, _transformer, FlowObjective, "transformer",
    ),
)  # fmt: skip


def family_named(name: str) -> Family:
    """The row of a family; the name is one of them."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(reference: str, pipeline: DiffusionPipeline) -> Family:
    """The row that a pipeline belongs to.

    Args:
        reference: what the user gave, for the message.

    Raises:
        FormatError: no family has such a pipeline.
    """
    kind = [f for f in FAMILIES if f.pipeline is type(pipeline)]
    width = pipeline.unet.config.cross_attention_dim if hasattr(pipeline, "unet") else None
    for family in kind:
        if family.width in (None, width):
            return family
    known = ", ".join(f"{f.name} ({f.width})" if f.width else f.name for f in FAMILIES)
    raise FormatError(
        f"base {reference!r} is a {type(pipeline).__name__} with cross-attention width {width}, "
        "which no known family has",
        f"known families: {known}",
    )
