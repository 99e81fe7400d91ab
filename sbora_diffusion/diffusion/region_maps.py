"""Where would the base put each subject? Soft regions from its own cross-attention.

The idea is that of prompt-to-prompt (Hertz et al., arXiv 2208.01626): the cross-attention
probabilities of a word, averaged over heads, layers and steps, show where the word goes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.adapters import gated
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import sample, told_texts
from sbora_diffusion.diffusion.prompts import Replaced
from sbora_diffusion.diffusion.region_attention import level_size, wrapped

EARLY = 0.4
"""Share of the steps that are looked at: the layout is settled by then."""
LEVEL = 16 * 16
"""Tokens of the level that is looked at, or the nearest that the UNet has."""
BLUR = 1.0
"""Standard deviation of the smoothing, in tokens of that level."""
BACKGROUND_SCORE = 0.4
"""A token belongs to the background where all maps, scaled to 0 … 1, are below this."""
TEMPERATURE = 0.1
"""Of the competition between the subjects and the background for a token."""


def attention_masks(
    base: Base,
    prompts: Sequence[Replaced],
    tokens: Sequence[Sequence[str]],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw the first part of the pictures with the frozen base and see where it puts the subjects.

    Args:
        prompts: with class nouns for the tokens.
        tokens: those of each concept.
        seeds, steps, guidance, negative_prompt, size: as for `draw_latents`.

    Returns:
        Masks (P, concepts, H, W) at the latents' resolution, in sum at most 1.

    Raises:
        ConfigError: the prompt is so long that a subject is cut off.
    """
    words = torch.stack([_word_positions(base, prompt, tokens) for prompt in prompts])
    maps = AttentionMaps(words.to(base.device))
    early = math.ceil(EARLY * steps)

    def stop(done: int) -> None:
        if done == early:
            base.pipeline._interrupt = True

    texts = told_texts(base, "prompt", [prompt.text for prompt in prompts])
    if negative_prompt:
        texts |= told_texts(base, "negative_prompt", [negative_prompt] * len(prompts))
    with (
        gated(base.pipeline, lambda _adapter, _x: False),
        wrapped(base.pipeline, lambda processor: _Recorder(processor, maps)),
    ):
        latents = sample(base, texts, seeds, steps, guidance, stop, size)
    return competing(maps.average(latents.shape[-2:]), latents.shape[-2:])


@dataclass
class AttentionMaps:
    """Sums of the attention that each latent token pays to each subject's words, by level.

    Attributes:
        words: (P, length, subjects), 1 where a text token belongs to a subject.
        sums: number of latent tokens → (P, tokens, subjects).
    """

    words: Tensor

    def __post_init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, attn: Attention, hidden_states: Tensor, text: Tensor) -> None:
        """Note one layer at one step; the last P rows are those with the prompt."""
        pictures = len(self.words)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states[-pictures:]))
        key = attn.head_to_batch_dim(attn.to_k(text[-pictures:]))
        probabilities = attn.get_attention_scores(query, key).unflatten(0, (pictures, -1)).mean(1)
        paid = probabilities.float() @ self.words
        self.sums[paid.shape[1]] = self.sums.get(paid.shape[1], 0) + paid

    def average(self, latents: Sequence[int]) -> Tensor:
        """(P, subjects, h, w) of the level nearest to `LEVEL`, for latents of (H, W)."""
        tokens = min(self.sums, key=lambda count: abs(math.log(count / LEVEL)))
        return self.sums[tokens].transpose(1, 2).unflatten(2, level_size(latents, tokens))


class _Recorder:
    """An attention processor that notes cross-attention maps and lets the original do the work."""

    def __init__(self, original: Any, maps: AttentionMaps):
        self.original, self.maps = original, maps

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            self.maps.add(attn, hidden_states, encoder_hidden_states)
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def competing(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (P, K, h, w) → soft masks (P, K, *size): each token goes mostly to the subject that gets
    most of its attention, or to the background."""
    scores = _blurred(maps)
    low, high = (f(scores, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scores = (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
    background = torch.full_like(scores[:, :1], BACKGROUND_SCORE)
    shares = torch.cat([background, scores], 1).div(TEMPERATURE).softmax(1)[:, 1:]
    return F.interpolate(shares, size=tuple(size), mode="bilinear")


def _blurred(maps: Tensor) -> Tensor:
    """Gaussian smoothing of (P, K, h, w); beyond the border the border goes on."""
    radius = math.ceil(2 * BLUR)
    distances = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(distances**2) / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    flat = F.pad(maps.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat[:, 0].unflatten(0, maps.shape[:2])


def _word_positions(base: Base, prompt: Replaced, tokens: Sequence[Sequence[str]]) -> Tensor:
    """(length, concepts): 1 where a token of the prompt lies in a noun of the concept."""
    tokenizer = base.pipeline.tokenizer
    offsets = tokenizer(
        prompt.text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    spans = [[span for token in own for span in prompt.spans[token]] for own in tokens]
    found = torch.tensor(
        [[any(a < stop and start < b for start, stop in own) for own in spans] for a, b in offsets]
    )
    if not found.any(0).all():
        missing = tokens[int(found.any(0).int().argmin())][0]
        raise ConfigError(f"the prompt is too long: {missing} is not read", "shorten the prompt")
    return found.float()
