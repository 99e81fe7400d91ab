"""What a concept is, and when one is valid: metadata, factors, token embeddings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sbora_diffusion.core.allocation import MAX_WIDTH, check_capacity, indices_for
from sbora_diffusion.core.errors import FormatError, NonFiniteError
from sbora_diffusion.core.fingerprint import LAYER_DIGITS

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
"""A concept's name: also a folder's, an adapter's and a region's, hence no dots and no slashes."""
TOKEN_PATTERN = r"^<[a-z0-9_-]{1,62}>$"
HUB_ID_PATTERN = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
EMBEDDING_KEY = re.compile(r"(text_encoder(?:_[23])?)\.(<[a-z0-9_-]{1,62}>)")
LAYER_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
EXTRAS = frozenset({"bias"})
"""Tensors that a recipe may add to a layer, by name; `bias` has one entry per output."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "the file is damaged or was not written by this program; train or download it again"

Text = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Scalar = str | int | float | bool | None


class TokenMeta(BaseModel):
    """A placeholder token and the word whose embedding it started from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: Annotated[str, StringConstraints(pattern=TOKEN_PATTERN)]
    initializer: Text


class ConceptMeta(BaseModel):
    """The JSON document of a concept file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    variant: Literal["fa", "fb"]
    rank: int = Field(ge=1, le=MAX_WIDTH)
    alpha: float = Field(gt=0)
    slot: int | None = Field(None, ge=0)
    start: int = Field(ge=0)  # the range of each layer's permutation, see core/allocation.py
    stop: int = Field(le=MAX_WIDTH)
    allocation_seed: int = Field(0, ge=0, lt=1 << 64)
    family: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")]
    # A local path would say nothing to others and is left out.
    base_name: Annotated[str, StringConstraints(pattern=f"^(pocket|{HUB_ID_PATTERN})?$")] = ""
    fingerprint: dict[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{48}$")]]
    widths: dict[str, Annotated[int, Field(ge=1, le=MAX_WIDTH)]]  # FA: inputs, FB: outputs
    rounded_base: Text | None = None  # e.g. "float16": trained on a rounded copy
    class_noun: Text
    tokens: tuple[TokenMeta, ...] = ()
    training: dict[str, Scalar] = {}
    digest: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _range_has_the_rank(self) -> "ConceptMeta":
        if self.stop - self.start != self.rank:
            raise ValueError(f"stop - start must be the rank {self.rank}")
        if self.slot is not None and self.start != self.slot * self.rank:
            raise ValueError(f"start must be slot * rank = {self.slot * self.rank}")
        return self

    @model_validator(mode="after")
    def _tokens_differ(self) -> "ConceptMeta":
        if len({entry.token for entry in self.tokens}) != len(self.tokens):
            raise ValueError("a placeholder token is listed twice")
        return self


assert LAYER_DIGITS == 48  # spelled out in the pattern of ConceptMeta.fingerprint


@dataclass(frozen=True, eq=False)
class LayerFactor:
    """What one adapted layer stores.

    Attributes:
        indices: int32, shape (rank,), ascending: the columns (FA) or rows (FB) that are owned.
        factor: trained, fp32, fp16 or bf16: B of shape (out, rank) for FA, A of (rank, in) for FB.
        extras: further tensors of a recipe, see `EXTRAS`; files may carry them, but nothing applies
            them yet, see `refuse_extras`.
    """

    indices: torch.Tensor
    factor: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def owned(self) -> frozenset[int]:
        """The indices as numbers."""
        return frozenset(self.indices.tolist())


@dataclass(frozen=True, eq=False)
class Concept:
    """One learned subject.

    Attributes:
        layers: canonical layer name to what it stores.
        embeddings: ``"<encoder>.<token>"``, e.g. ``"text_encoder.<robot>"``, to the embeddings of
            the token, shape (vectors, dim).
    """

    meta: ConceptMeta
    layers: Mapping[str, LayerFactor]
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict)


def validate_concept(concept: Concept) -> None:
    """Check everything that can be known about a concept without its base.

    Raises:
        FormatError: layers, shapes, types, indices or tokens do not fit together.
        NonFiniteError: a tensor has NaN or infinite values.
        CapacityError: the range ends beyond the narrowest layer.
    """
    meta = concept.meta
    _same_names("fingerprint", meta.fingerprint, concept.layers)
    _same_names("list of widths", meta.widths, concept.layers)
    if not concept.layers:
        raise FormatError("no layer is adapted", _REMEDY)
    check_capacity(meta.widths, meta.start, meta.stop)
    _check_shapes(concept)
    for layer in sorted(concept.layers):
        _check_layer(layer, concept.layers[layer], meta)
    _check_embeddings(concept)


def refuse_extras(concept: Concept) -> None:
    """Called by all that applies or measures a concept, since ignoring a part would be silent.

    Raises:
        FormatError: a layer stores more than indices and factor.
    """
    layers = concept.layers.items()
    found = sorted(f"{layer}.{name}" for layer, stored in layers for name in stored.extras)
    if found:
        raise FormatError(
            f"concept {concept.meta.name!r} stores {len(found)} tensors that this version cannot "
            f"apply, first {found[0]!r}",
            "update sbora-diffusion, or train the concept again",
        )


def _same_names(what: str, found: Mapping[str, object], layers: Mapping[str, object]) -> None:
    differing = sorted(found.keys() ^ layers.keys())
    if differing:
        raise FormatError(
            f"{what} and layers differ in {len(differing)} names, first {differing[:3]}", _REMEDY
        )


def _check_layer(layer: str, stored: LayerFactor, meta: ConceptMeta) -> None:
    if not LAYER_NAME.fullmatch(layer):
        raise FormatError(f"{layer[:200]!r} is not a layer name", _REMEDY)
    width = meta.widths[layer]
    _check_floats(f"factor of {layer!r}", stored.factor)
    expected = indices_for(layer, width, meta.start, meta.stop, meta.allocation_seed)
    if stored.indices.dtype != torch.int32 or not torch.equal(stored.indices.cpu(), expected):
        raise FormatError(
            f"indices of {layer!r} are not those of the range {meta.start} to {meta.stop - 1} with "
            f"allocation seed {meta.allocation_seed}",
            _REMEDY,
        )
    outputs = stored.factor.shape[0] if meta.variant == "fa" else width
    for name, extra in stored.extras.items():
        if name not in EXTRAS or tuple(extra.shape) != (outputs,):
            raise FormatError(
                f"{layer}.{name} of shape {tuple(extra.shape)} is unknown; known are "
                f"{sorted(EXTRAS)} of shape ({outputs},)",
                _REMEDY,
            )
        _check_floats(f"{layer}.{name}", extra)


def _check_shapes(concept: Concept) -> None:
    rank, side = concept.meta.rank, 1 if concept.meta.variant == "fa" else 0
    found = {layer: tuple(stored.factor.shape) for layer, stored in concept.layers.items()}
    wrong = [
        x for x, shape in found.items() if len(shape) != 2 or shape[side] != rank or 0 in shape
    ]
    if wrong:
        first, expected = min(wrong), f"(out, {rank})" if side else f"({rank}, in)"
        raise FormatError(
            f"factor of {first[:200]!r} must have shape {expected}, has {found[first]}; "
            f"{len(wrong)} of {len(found)} factors do not fit",
            _REMEDY,
        )


def _check_embeddings(concept: Concept) -> None:
    wanted = {entry.token for entry in concept.meta.tokens}
    encoders: dict[str, set[str]] = {}
    for key, vectors in concept.embeddings.items():
        match = EMBEDDING_KEY.fullmatch(key)
        if not match or vectors.dim() != 2 or not vectors.numel():
            raise FormatError(f"{key[:200]!r} is not a token's (vectors, dim) embeddings", _REMEDY)
        encoders.setdefault(match[1], set()).add(match[2])
        _check_floats(f"embedding of {key!r}", vectors)
    for encoder, found in encoders.items() or {"any text encoder": set()}.items():
        if found != wanted:
            raise FormatError(
                f"embeddings of {encoder} are for {sorted(found)}, tokens are {sorted(wanted)}",
                _REMEDY,
            )


def _check_floats(what: str, values: torch.Tensor) -> None:
    if values.dtype not in FLOATS:
        raise FormatError(f"{what} must be fp32, fp16 or bf16, is {values.dtype}", _REMEDY)
    if not values.isfinite().all():
        raise NonFiniteError(f"{what} has NaN or infinite values", "train the concept again")
