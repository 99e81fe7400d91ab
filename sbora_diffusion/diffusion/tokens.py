"""Placeholder tokens: a concept's own words, appended after the base's vocabulary.

A placeholder may have several vectors. The vectors after the first get the names `<token>_1`,
`<token>_2` …, which stock diffusers pipelines expand by themselves (textual inversion).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sbora_diffusion.core.errors import ConflictError, FormatError

SPARE_ROWS = 256
ENCODERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}
"""Text encoder → its tokenizer, as diffusers' pipelines name them."""
FIRST = "text_encoder"
_OWN_BASE = "give the base that it was trained on"


def vector_names(token: str, count: int) -> list[str]:
    """`<cat>`, 3 → `<cat>`, `<cat>_1`, `<cat>_2`."""
    return [token, *(f"{token}_{k}" for k in range(1, count))]


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders that a pipeline has, by name."""
    found = {name: getattr(pipeline, name, None) for name in ENCODERS}
    return {name: model for name, model in found.items() if model is not None}


def word_vectors(pipeline: Any, words: str, encoder: str = FIRST) -> Tensor:
    """The base's embeddings of some words, (tokens, dim), fp32: where a placeholder starts."""
    ids = getattr(pipeline, ENCODERS[encoder])(words, add_special_tokens=False).input_ids
    weight = getattr(pipeline, encoder).get_input_embeddings().weight
    return weight[torch.tensor(ids, device=weight.device)].detach().float().clone()


def refuse_known_token(pipeline: Any, token: str) -> None:
    """Raise ConflictError if the base's vocabulary already has this token."""
    for encoder in text_encoders(pipeline):
        _refuse_known(getattr(pipeline, ENCODERS[encoder]), token)


class PlaceholderTokens:
    """The placeholder rows of one pipeline, in each of its text encoders.

    Their names are those of a concept file, `text_encoder_2.<cat>`; `<cat>` alone is the first text
    encoder's.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        for name, model in text_encoders(pipeline).items():
            _pool_at_the_end(model, getattr(pipeline, ENCODERS[name]).eos_token_id)
        self._rows = {name: _EncoderTokens(pipeline, name) for name in text_encoders(pipeline)}
        self._vectors: dict[str, Tensor] = {}

    @property
    def base_size(self) -> int:
        """Words in the first text encoder's own vocabulary."""
        return self._rows[FIRST].base_size

    def set(self, vectors: Mapping[str, Tensor]) -> None:
        """Make `vectors` (name → (count, dim)) the whole set of placeholders.

        Raises:
            ConflictError: a token is in the base's vocabulary; nothing is changed.
            FormatError: the vectors are not as wide as the base's, or for a text encoder that it
                does not have; nothing is changed.
        """
        named = {_full_name(name): rows for name, rows in vectors.items()}
        split = _by_encoder(named, self._rows)
        for encoder, rows in self._rows.items():
            rows.check(split[encoder])
        for encoder, rows in self._rows.items():
            rows.set(split[encoder])
        self._vectors = named

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Add placeholders; raises as `set` does, and for a placeholder that is there already."""
        for token in {_split(_full_name(name))[1] for name in vectors}:
            refuse_known_token(self.pipeline, token)
        self.set({**self._vectors, **vectors})

    def remove(self, tokens: list[str]) -> None:
        """Take placeholders out of all text encoders."""
        self.set({n: v for n, v in self._vectors.items() if _split(n)[1] not in tokens})


def _full_name(name: str) -> str:
    return name if "." in name else f"{FIRST}.{name}"


def _split(name: str) -> tuple[str, str]:
    """`text_encoder_2.<cat>` → its two parts."""
    encoder, _, token = name.partition(".")
    return encoder, token


def _by_encoder(
    vectors: Mapping[str, Tensor], encoders: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    split: dict[str, dict[str, Tensor]] = {encoder: {} for encoder in encoders}
    for name, rows in vectors.items():
        encoder, token = _split(name)
        if encoder not in split:
            raise FormatError(
                f"{token} has vectors for {encoder}, which the base does not have", _OWN_BASE
            )
        split[encoder][token] = rows
    return split


class _EncoderTokens:
    """The placeholder rows of one text encoder.

    The rows are packed anew, in sorted order, whenever the set changes, so that the model does not
    depend on the order in which concepts came and went, nor on any random state. The base's rows
    are copied once; after that a change costs what the placeholders cost.
    """

    def __init__(self, pipeline: Any, encoder: str):
        self._pipeline, self._encoder = pipeline, getattr(pipeline, encoder)
        self._base_embedding = self._encoder.get_input_embeddings()
        self._tokenizer_name = ENCODERS[encoder]
        self._base_tokenizer = getattr(pipeline, self._tokenizer_name)
        self._table: Tensor | None = None
        # T5 has more rows than words: an added word takes the first of these.
        self.base_size = min(self._base_embedding.num_embeddings, len(self._base_tokenizer))

    def set(self, vectors: Mapping[str, Tensor]) -> None:
        """Make `vectors` (token → (count, dim)), which were checked, the whole set."""
        ordered = {token: vectors[token] for token in sorted(vectors)}
        tokenizer, embedding = self._base_tokenizer, self._base_embedding
        if ordered:
            names = [n for t, v in ordered.items() for n in vector_names(t, len(v))]
            tokenizer = _extended(self._base_tokenizer, names)
            rows = self._rows(torch.cat([v.to(embedding.weight) for v in ordered.values()]))
            embedding = nn.Embedding.from_pretrained(rows, freeze=True)
        setattr(self._pipeline, self._tokenizer_name, tokenizer)
        self._encoder.set_input_embeddings(embedding)
        self._encoder.config.vocab_size = embedding.num_embeddings

    def check(self, vectors: Mapping[str, Tensor]) -> None:
        """Raise if `set` cannot take these."""
        width = self._base_embedding.weight.shape[1]
        for token, rows in vectors.items():
            _refuse_known(self._base_tokenizer, token)
            if rows.shape[1] != width:
                raise FormatError(
                    f"{token} is {rows.shape[1]} wide, the base's words are {width}", _OWN_BASE
                )

    def _rows(self, placeholders: Tensor) -> Tensor:
        """The base's rows, then these: a view of a table with spare rows at its end."""
        base, stop = self._base_embedding.weight.detach(), self.base_size + len(placeholders)
        size, table = max(stop, len(base)), self._table
        if table is None or len(table) < size or table.dtype != base.dtype:
            table = base.new_empty(size + SPARE_ROWS, base.shape[1])
            table[: len(base)] = base
            self._table = table
        table[self.base_size : stop] = placeholders
        table[stop:size] = base[stop:]
        return table[:size]


def _pool_at_the_end(encoder: Any, end: int) -> None:
    """Older CLIP configurations say that texts end with token 2, and transformers then pools at the
    highest number of a text: a placeholder's. Without one, both give the same."""
    if encoder.config.eos_token_id == 2 != end:
        encoder.config.eos_token_id = end
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = end


def expanded(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text with all vectors of its placeholders, as diffusers' pipelines expand it; that of
    Stable Diffusion 3 does not."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)


def read_texts(
    pipeline: Any, texts: Sequence[str], encoder: str = FIRST, length: int | None = None
) -> BatchEncoding:
    """Ids and mask of texts, all their placeholders' vectors among them, padded or cut to the
    length that the text encoder reads: (N, tokens) each.

    Args:
        length: tokens that are read, as many as the tokenizer says by default.
    """
    tokenizer = getattr(pipeline, ENCODERS[encoder])
    return tokenizer(
        [expanded(text, tokenizer) for text in texts],
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
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
