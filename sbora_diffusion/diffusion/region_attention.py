"""Attention that keeps each concept to its region.

The mechanism is diffusers' own: attention processors wrap those that the UNet has, and a gate in
the adapted layers decides how much of a concept's update each token gets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from sbora_diffusion.diffusion.adapters import adapter_name, gated

BACKGROUND = ""
"""The stream of what lies outside all regions; no concept has this name."""


class RegionGate:
    """How much of each concept's update a token gets: its mask, or all in the concept's own stream.

    Args:
        concepts: names, in the order in which their streams are summed.
        masks: (P, concepts, H, W) at the latents' resolution, ≥ 0, at most 1 in sum; one for each
            of the P pictures of a batch, or P = 1 for all. The background gets the rest.
    """

    def __init__(self, concepts: Sequence[str], masks: Tensor):
        rest = (1 - masks.sum(1, keepdim=True)).clamp_min(0)
        self.streams = [BACKGROUND, *concepts]
        self._columns = {adapter_name(name): k for k, name in enumerate(self.streams)}
        self._masks = torch.cat([rest, masks], 1)
        self._levels: dict[int, Tensor] = {}
        self._stream: str | None = None

    @contextmanager
    def only(self, stream: str) -> Iterator[None]:
        """Inside, this stream's concept gets all of its update and the others none of theirs."""
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def __call__(self, adapter: str, x: Tensor) -> Tensor | bool:
        if self._stream is not None:
            return adapter == adapter_name(self._stream)
        return self.shares(x)[self._columns[adapter]]

    def shares(self, x: Tensor) -> Tensor:
        """The masks for latent tokens x (rows, tokens, C): (streams, rows, tokens, 1).

        The rows are the batch's pictures, twice with guidance, the unconditional ones first.
        """
        rows, tokens = x.shape[:2]
        if tokens not in self._levels:
            self._levels[tokens] = _at_level(self._masks, tokens)
        level = self._levels[tokens].to(x).transpose(0, 1)  # (streams, P, tokens)
        return level.repeat(1, rows // level.shape[1], 1)[..., None]


class RegionCrossAttention:
    """A cross-attention processor: once per stream with that stream's text and adapters, blended by
    the masks. The texts come side by side, (rows, streams · length, D). Self-attention is passed
    on: there the gate alone acts."""

    def __init__(self, original: Any, gate: RegionGate):
        self.original, self.gate = original, gate

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            return self.original(attn, hidden_states, None, attention_mask, temb)
        streams = self.gate.streams
        texts = encoder_hidden_states.chunk(len(streams), dim=1)
        blended = None
        for stream, text, share in zip(
            streams, texts, self.gate.shares(hidden_states), strict=True
        ):
            if not share.any():
                continue
            with self.gate.only(stream):
                own = self.original(attn, hidden_states, text.contiguous(), attention_mask, temb)
            blended = share * own if blended is None else blended + share * own
        assert blended is not None
        return blended


@contextmanager
def region_attention(pipeline: DiffusionPipeline, gate: RegionGate) -> Iterator[None]:
    """Confine the attached concepts to their regions; afterwards all is as it was before."""
    with gated(pipeline, gate), wrapped(pipeline, lambda p: RegionCrossAttention(p, gate)):
        yield


@contextmanager
def wrapped(pipeline: DiffusionPipeline, wrap: Any) -> Iterator[None]:
    """Put `wrap(processor)` in the place of each of the UNet's attention processors."""
    unet = pipeline.unet
    before = unet.attn_processors
    unet.set_attn_processor({name: wrap(processor) for name, processor in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(dict(before))


def _at_level(masks: Tensor, tokens: int) -> Tensor:
    """Masks (P, K, H, W) averaged to the UNet's level of that many tokens: (P, K, tokens)."""
    return F.adaptive_avg_pool2d(masks, level_size(masks.shape[-2:], tokens)).flatten(2)


def level_size(latents: Sequence[int], tokens: int) -> tuple[int, int]:
    """Height and width of the UNet's level of that many tokens, for latents of (H, W)."""
    height, width = latents
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == tokens, "latent tokens must be those of a level of the UNet"
    return height, width
