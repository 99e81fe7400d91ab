"""Placeholder tokens: a concept's own words, appended after the base's vocabulary.

A placeholder may have several vectors. The vectors after the first get the names `<token>_1`,
`<token>_2` …, which stock diffusers pipelines expand by themselves (textual inversion).
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sbora_diffusion.core.errors import ConflictError, FormatError

SPARE_ROWS = 256


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
    _refuse_known(pipeline.tokenizer, token)


class PlaceholderTokens:
    """The placeholder rows of one pipeline.

    The rows are packed anew, in sorted order, whenever the set changes, so that the model does not
    depend on the order in which concepts came and went, nor on any random state. The base's rows
    are copied once; after that a change costs what the placeholders cost.
    """

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.pipeline = pipeline
        self._base_embedding = pipeline.text_encoder.get_input_embeddings()
        self.base_size = self._base_embedding.num_embeddings
        self._base_tokenizer = pipeline.tokenizer
        self._table: Tensor | None = None
        self._vectors: dict[str, Tensor] = {}

    def set(self, vectors: Mapping[str, Tensor]) -> None:
        """Make `vectors` (token → (count, dim)) the whole set of placeholders.

        Raises:
            ConflictError: a token is in the base's vocabulary; nothing is changed.
            FormatError: the vectors are not as wide as the base's; nothing is changed.
        """
        self._check(vectors)
        ordered = {token: vectors[token] for token in sorted(vectors)}
        tokenizer, embedding = self._base_tokenizer, self._base_embedding
        if ordered:
            names = [n for t, v in ordered.items() for n in vector_names(t, len(v))]
            tokenizer = _extended(self._base_tokenizer, names)
            rows = self._rows(torch.cat([v.to(embedding.weight) for v in ordered.values()]))
            embedding = nn.Embedding.from_pretrained(rows, freeze=True)
        self._vectors = ordered
        self.pipeline.tokenizer = tokenizer
        self.pipeline.text_encoder.set_input_embeddings(embedding)
        self.pipeline.text_encoder.config.vocab_size = embedding.num_embeddings

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Add placeholders; raises as `set` does, and for a placeholder that is there already."""
        for token in vectors:
            refuse_known_token(self.pipeline, token)
        self.set({**self._vectors, **vectors})

    def remove(self, tokens: list[str]) -> None:
        self.set({t: v for t, v in self._vectors.items() if t not in tokens})

    def _check(self, vectors: Mapping[str, Tensor]) -> None:
        width = self._base_embedding.weight.shape[1]
        for token, rows in vectors.items():
            _refuse_known(self._base_tokenizer, token)
            if rows.shape[1] != width:
                raise FormatError(f"{token} is {rows.shape[1]} wide, the base's words are {width}")

    def _rows(self, placeholders: Tensor) -> Tensor:
        """The base's rows, then these: a view of a table with spare rows at its end."""
        base, size = self._base_embedding.weight.detach(), self.base_size + len(placeholders)
        table = self._table
        if table is None or len(table) < size or table.dtype != base.dtype:
            table = base.new_empty(size + SPARE_ROWS, base.shape[1])
            table[: self.base_size] = base
            self._table = table
        table[self.base_size : size] = placeholders
        return table[:size]


def read_texts(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> BatchEncoding:
    """Ids and mask of texts, all their placeholders' vectors among them, padded or cut to the
    length that the text encoder reads: (N, tokens) each."""
    tokenizer = pipeline.tokenizer
    return tokenizer(
        [pipeline.maybe_convert_prompt(text, tokenizer) for text in texts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def _refuse_known(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    # Listing the vocabulary to find out would take a tenth of a second.
    if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token)) == token:
        raise ConflictError(f"token {token!r} is already in the base's vocabulary", "rename it")


def _extended(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedTokenizerBase:
    """A copy that knows more tokens.

    Only its added tokens are its own: vocabulary and rules, half a second's work to copy at 49,408
    words, never change and are shared.
    """
    extended = copy.copy(tokenizer)
    for name, value in vars(tokenizer).items():
        if isinstance(value, Tokenizer):
            setattr(extended, name, _with_shared_model(value))
        elif isinstance(value, list | dict):
            setattr(extended, name, copy.copy(value))
    extended.add_tokens(names)
    return extended


def _with_shared_model(backend: Tokenizer) -> Tokenizer:
    """A second tokenizer around the same model, with added tokens of its own.

    Padding and truncation stay behind: transformers sets both at every call, so a saved model would
    depend on whether its base had read a prompt before.
    """
    twin = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(twin, part, value)
    for _, token in sorted(backend.get_added_tokens_decoder().items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    return twin


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
