"""Placeholder tokens: a concept's own words, appended after the base's vocabulary.

A placeholder may have several vectors. The vectors after the first get the names `<token>_1`,
`<token>_2` …, which stock diffusers pipelines expand by themselves (textual inversion).
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sbora_diffusion.core.errors import ConflictError, FormatError


def vector_names(token: str, count: int) -> list[str]:
    """`<cat>`, 3 → `<cat>`, `<cat>_1`, `<cat>_2`."""
    return [token, *(f"{token}_{k}" for k in range(1, count))]


def word_vectors(pipeline: StableDiffusionPipeline, words: str) -> Tensor:
    """The base's embeddings of some words, (tokens, dim), fp32: where a placeholder starts."""
    ids = pipeline.tokenizer(words, add_special_tokens=False).input_ids
    weight = pipeline.text_encoder.get_input_embeddings().weight
    return weight[torch.tensor(ids, device=weight.device)].detach().float().clone()


def refuse_known_token(pipeline: StableDiffusionPipeline, token: str) -> None:
    """Raise ConflictError if the base's vocabulary already has this token."""
    if token in pipeline.tokenizer.get_vocab():
        raise ConflictError(f"token {token!r} is already in the base's vocabulary", "rename it")


class PlaceholderTokens:
    """The placeholder rows of one pipeline.

    The rows are packed anew, in sorted order, whenever the set changes, so that the model does not
    depend on the order in which concepts came and went, nor on any random state.
    """

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.pipeline = pipeline
        self.base_size = pipeline.text_encoder.get_input_embeddings().num_embeddings
        self._base_tokenizer = pipeline.tokenizer
        self._base_weight = pipeline.text_encoder.get_input_embeddings().weight
        self._vectors: dict[str, Tensor] = {}

    def set(self, vectors: Mapping[str, Tensor]) -> None:
        """Make `vectors` (token → (count, dim)) the whole set of placeholders."""
        self._vectors = {token: vectors[token] for token in sorted(vectors)}
        names = [n for t, v in self._vectors.items() for n in vector_names(t, len(v))]
        rows = [v.to(self._base_weight) for v in self._vectors.values()]
        weight = torch.cat([self._base_weight.detach(), *rows])
        self.pipeline.tokenizer = _extended(self._base_tokenizer, names)
        _set_embeddings(self.pipeline.text_encoder, weight)

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Add placeholders.

        Raises:
            ConflictError: a token is already in the vocabulary; nothing is changed.
            FormatError: the vectors are not as wide as the base's; nothing is changed.
        """
        width = self._base_weight.shape[1]
        for token, rows in vectors.items():
            refuse_known_token(self.pipeline, token)
            if rows.shape[1] != width:
                raise FormatError(f"{token} is {rows.shape[1]} wide, the base's words are {width}")
        self.set({**self._vectors, **vectors})

    def remove(self, tokens: list[str]) -> None:
        self.set({t: v for t, v in self._vectors.items() if t not in tokens})


def _extended(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedTokenizerBase:
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(names)
    return extended


def _set_embeddings(text_encoder: PreTrainedModel, weight: Tensor) -> None:
    embedding = nn.Embedding.from_pretrained(weight, freeze=True)
    text_encoder.set_input_embeddings(embedding)
    text_encoder.config.vocab_size = len(weight)


class TrainableTokens(nn.Module):
    """An embedding layer whose last rows are a trainable fp32 parameter, the others frozen.

    Args:
        embedding: the layer with base rows and placeholder rows.
        trainable: how many rows at the end train.
    """

    def __init__(self, embedding: nn.Embedding, trainable: int):
        super().__init__()
        self.embedding = embedding
        self.first = embedding.num_embeddings - trainable
        self.vectors = nn.Parameter(embedding.weight[self.first :].detach().float().clone())

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) → embeddings (…, dim) in the base's dtype."""
        frozen = self.embedding(ids)
        # Not plain indexing: its gradient adds up in an order that depends on the threads.
        trained = F.embedding((ids - self.first).clamp_min(0), self.vectors).to(frozen.dtype)
        return torch.where((ids >= self.first)[..., None], trained, frozen)
