"""Texts → what a denoiser is told of them, in training: read by the text encoders, or kept."""

from collections.abc import Collection, Iterable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.families import Encoder, Read, Told
from sbora_diffusion.diffusion.tokens import read_texts


class Texts:
    """What a base makes of texts.

    Args:
        base: with the placeholders of the texts.
        kept: encoders whose output does not change, see `keep`.
    """

    def __init__(self, base: Base, kept: Collection[str] = ()) -> None:
        self._base, self._kept = base, set(kept)
        self._encoders = base.kind.present(base.pipeline)
        self._rows: dict[str, int] = {}
        self._outputs: dict[str, Read] = {}
        self.ids = cache(self._ids)

    @torch.no_grad()
    def keep(self, texts: Iterable[str]) -> None:
        """Let the encoders that are kept read these texts, all that there will be, once."""
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        for encoder in self._encoders:
            if encoder.model in self._kept:
                reads = [self._read(encoder, text) for text in self._rows]
                states, pooled = zip(*reads, strict=True)
                joined = torch.cat(pooled) if pooled[0] is not None else None
                self._outputs[encoder.model] = torch.cat(states), joined
        self._base.rest()

    def _read(self, encoder: Encoder, text: str) -> Read:
        model = getattr(self._base.pipeline, encoder.model)
        ids = self._words(encoder, text)[None].to(self._base.device)
        return self._base.kind.reads(encoder, model, ids)

    def _ids(self, text: str) -> Tensor:
        """(words,): the numbers of a text's tokens for each encoder in turn; for those that are
        kept one number, its row."""
        parts = [self._words(e, text) for e in self._encoders if e.model not in self._kept]
        return torch.cat([*parts, torch.tensor([self._rows[text]])] if self._kept else parts)

    def _words(self, encoder: Encoder, text: str) -> Tensor:
        return read_texts(self._base.pipeline, [text], encoder.model, encoder.length).input_ids[0]

    def told(self, models: Mapping[str, nn.Module], ids: Tensor, dtype: torch.dtype) -> Told:
        """What the denoiser is told.

        Args:
            models: the text encoders that are not kept.
            ids: (B, words), as `ids` gives them.
        """
        reads, at = [], 0
        for encoder in self._encoders:
            if encoder.model in self._kept:
                states, pooled = self._outputs[encoder.model]
                rows = ids[:, -1]
                reads.append((states[rows], pooled[rows] if pooled is not None else None))
            else:
                stop = at + self._length(encoder)
                own = self._base.kind.reads(encoder, models[encoder.model], ids[:, at:stop])
                reads.append(own)
                at = stop
        states, pooled = self._base.kind.join(reads, self._base.denoiser.config)
        return Told(states.to(dtype), pooled.to(dtype) if pooled is not None else None)

    def _length(self, encoder: Encoder) -> int:
        return encoder.length or getattr(self._base.pipeline, encoder.tokenizer).model_max_length
