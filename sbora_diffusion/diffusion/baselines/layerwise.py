"""Placeholders with one vector for each cross-attention layer of the UNet.

Such words (P+, Voynov et al. 2023, arXiv 2303.09522; Mix-of-Show, Gu et al. 2023, arXiv 2305.18292)
mean something else to each layer, so a prompt has text states for each. The text encoder reads each
prompt once for each layer, and leaves the states side by side, (B, tokens, layers · dim); each
cross-attention reads its own part. Everything between, diffusers' pipeline included, passes them on
as it passes plain states.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, arange, nn, where

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, TrainableTokens


def cross_attentions(pipeline: StableDiffusionPipeline) -> dict[str, nn.Module]:
    """Module path in the UNet → cross-attention, in the order of the vectors: that of the paths."""
    found = {n: m for n, m in pipeline.unet.named_modules() if n.endswith(".attn2")}
    return dict(sorted(found.items()))


class LayerwiseTokens(TrainableTokens):
    """An embedding whose last rows have one vector for each of several layers.

    Attributes:
        vectors: (rows, layers, dim), trainable, fp32; at first the rows' own for every layer.
    """

    def __init__(self, embedding: nn.Embedding, rows: int, layers: int):
        super().__init__(embedding, rows)
        self.layers = layers
        self.vectors = nn.Parameter(self.vectors.detach()[:, None].repeat(1, layers, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B · layers, tokens), each prompt's readings together → (B · layers, tokens, dim)."""
        frozen = self.embedding(ids)
        layer = arange(len(ids), device=ids.device).remainder(self.layers)[:, None]
        own = (ids - self.first).clamp_min(0) * self.layers + layer
        trained = F.embedding(own, self.vectors.flatten(0, 1)).to(frozen.dtype)
        return where((ids >= self.first)[..., None], trained, frozen)


def layerwise_states(pipeline: StableDiffusionPipeline) -> ExitStack:
    """Let the text encoder speak to each cross-attention apart, until the stack is closed."""
    attentions = list(cross_attentions(pipeline).values())
    stack, count = ExitStack(), len(attentions)
    encoder = pipeline.text_encoder
    repeat = encoder.register_forward_pre_hook(partial(_repeated, count), with_kwargs=True)
    stack.callback(repeat.remove)
    stack.callback(encoder.register_forward_hook(partial(_side_by_side, count)).remove)
    for number, attention in enumerate(attentions):
        choose = partial(_own_part, number, count)
        handle = attention.register_forward_pre_hook(choose, with_kwargs=True)
        stack.callback(handle.remove)
    return stack


def _repeated(
    count: int, _encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids, *rest = args
    return (ids.repeat_interleave(count, 0), *rest), kwargs


def _side_by_side(count: int, _encoder: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    states = output.last_hidden_state
    batch = states.view(-1, count, *states.shape[1:])  # (B, layers, tokens, dim)
    output.last_hidden_state = batch.transpose(1, 2).flatten(2)
    return output


def _own_part(
    number: int, count: int, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    own = kwargs["encoder_hidden_states"].chunk(count, -1)[number]
    return args, {**kwargs, "encoder_hidden_states": own}


class Vocabulary:
    """The placeholders of one pipeline, with one vector for all layers or one for each.

    Args:
        pipeline: without placeholders; `set({})` gives it back as it was.
    """

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.pipeline = pipeline
        self._tokens = PlaceholderTokens(pipeline)
        self._states = ExitStack()

    def set(self, vectors: Mapping[str, Tensor]) -> None:
        """Make `vectors` the whole set: token → (count, dim), or (count, layers, dim) for all.

        Raises:
            ConflictError, FormatError: see `PlaceholderTokens.set`; also if they are of both kinds
                or for another number of layers. Nothing is changed.
        """
        layered = self._layered(vectors)
        plain = {token: v.mean(1) if layered else v for token, v in vectors.items()}
        self._tokens.set(plain)
        self._states.close()
        if layered:
            ordered = [vectors[token] for token in sorted(vectors)]
            self._use(ordered)

    def _layered(self, vectors: Mapping[str, Tensor]) -> bool:
        sizes = {tuple(v.shape[1:-1]) for v in vectors.values()}
        count = len(cross_attentions(self.pipeline))
        if sizes <= {()}:
            return False
        if sizes != {(count,)}:
            raise FormatError(
                f"placeholders with vectors for {sorted(sizes)} layers, the base has {count}",
                "merge concepts of one method, trained on this base",
            )
        return True

    def _use(self, ordered: list[Tensor]) -> None:
        encoder, rows = self.pipeline.text_encoder, sum(map(len, ordered))
        tokens = LayerwiseTokens(encoder.get_input_embeddings(), rows, ordered[0].shape[1])
        at = 0
        tokens.requires_grad_(False)
        for vectors in ordered:
            tokens.vectors[at : at + len(vectors)] = vectors
            at += len(vectors)
        encoder.set_input_embeddings(tokens)
        self._states = layerwise_states(self.pipeline)
