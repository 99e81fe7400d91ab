"""Concepts in a pipeline of stock diffusers, for people who write their own code around one.

    from sbora_diffusion import load_sbora

    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    bear = load_sbora(pipe, "plushbear.safetensors")
    pipe("a photo of <plushbear> on the beach")
    bear.swap("otherbear.safetensors")
    bear.unload()

diffusers' own `load_lora_weights` does not know concept files.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.concept import Concept, refuse_extras
from sbora_diffusion.core.concept_set import read_concepts
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.fingerprint import Fingerprint, compare, fingerprint
from sbora_diffusion.core.folded_set import Weighted, refuse_bad_weight
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.tuner import SboraLinear
from sbora_diffusion.diffusion.adapters import (
    activate,
    adapter_name,
    eject,
    inject,
    refuse_misfits,
)
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens

_HOST = "_sbora_host"


def load_sbora(
    pipe: Any, path: str | Path, weight: float = 1.0, allow_overlap: bool = False
) -> "LoadedSbora":
    """Attach the concepts of a file to a diffusers pipeline, with their tokens.

    Load several files one after another; `unload` leaves the pipeline as it was. Load before
    `torch.compile`, and `swap` afterwards: that changes numbers alone, so nothing is compiled anew.

    Args:
        path: a concept file or a concept set.
        weight: λ, multiplied with those in a set.
        allow_overlap: accept concepts of one variant that share indices.

    Raises:
        BaseMismatch: a concept belongs to another base.
        ConflictError: name, token or indices are already in use.
        FormatError, IntegrityError: see `read_concepts`.
        ConfigError: the weight is not finite.
        The pipeline is unchanged then.
    """
    host = getattr(pipe, _HOST, None) or _Host(pipe)
    loaded = LoadedSbora(host, _read(path, weight), allow_overlap)
    setattr(pipe, _HOST, host)
    return loaded


class LoadedSbora:
    """Concepts that `load_sbora` attached.

    Attributes:
        concepts: with their weights λ.
    """

    def __init__(self, host: "_Host", concepts: Sequence[Weighted], allow_overlap: bool) -> None:
        host.check([c for c, _ in [*host.concepts(), *concepts]], allow_overlap)
        self._host, self._allow_overlap = host, allow_overlap
        self._places: list[_Place] = []
        self.concepts: list[Weighted] = []
        host.loaded.append(self)
        try:
            for concept, _ in concepts:
                self._places.append(_Place(host, concept))
            self._fill(concepts)
        except BaseException:
            self.unload()
            raise

    def swap(self, path: str | Path, weight: float = 1.0) -> None:
        """Put the concepts of another file in the place of these: indices, factors and embeddings
        are written over, so compiled models stay compiled (a text encoder's, while the number of
        placeholders' vectors stays).

        Raises:
            ConfigError: the file has not as many concepts, of the same variants, ranks and layers.
            See also `load_sbora`; nothing is changed.
        """
        self._replace(_read(path, weight))

    def set_weight(self, weight: float) -> None:
        """Change λ, of all of them; raises ConfigError if it is not finite."""
        self._replace([(concept, weight) for concept, _ in self.concepts])

    def unload(self) -> None:
        """Take the concepts and their tokens out; the pipeline is as it was before."""
        for place in self._places:
            place.clear()
        self._places, self.concepts = [], []
        if self in self._host.loaded:
            self._host.loaded.remove(self)
        self._host.settle()

    def _replace(self, concepts: Sequence[Weighted]) -> None:
        if len(concepts) != len(self._places):
            raise ConfigError(
                f"{len(self._places)} concepts are loaded here, the file has {len(concepts)}",
                "unload them and load the file",
            )
        for place, (concept, _) in zip(self._places, concepts, strict=True):
            place.refuse_other_shape(concept)
        kept = [c for c, _ in self._host.concepts() if c not in [old for old, _ in self.concepts]]
        self._host.check([*kept, *(concept for concept, _ in concepts)], self._allow_overlap)
        self._fill(concepts)

    def _fill(self, concepts: Sequence[Weighted]) -> None:
        for _, weight in concepts:
            refuse_bad_weight(weight)
        before, self.concepts = self.concepts, list(concepts)
        try:
            self._host.settle()
        except BaseException:
            self.concepts = before
            self._host.settle()
            raise
        for place, (concept, weight) in zip(self._places, concepts, strict=True):
            place.fill(concept, weight)


class _Host:
    """What a pipeline was before anything was loaded, and what is loaded now."""

    def __init__(self, pipe: Any) -> None:
        layers = target_layers(pipe)
        self.pipe, self.loaded = pipe, list[LoadedSbora]()
        self.fingerprint: Fingerprint = fingerprint((n, x.weight) for n, x in layers.items())
        self.tokens = PlaceholderTokens(pipe)
        self.taken = 0

    def concepts(self) -> list[Weighted]:
        return [pair for loaded in self.loaded for pair in loaded.concepts]

    def check(self, concepts: Sequence[Concept], allow_overlap: bool) -> None:
        """Raise unless these concepts may live in the pipeline together."""
        for concept in concepts:
            refuse_extras(concept)
            compare(concept.meta.fingerprint, self.fingerprint)
        check_mergeable(concepts, allow_overlap)

    def settle(self) -> None:
        """Make tokens and active adapters those of what is loaded."""
        vectors: dict[str, torch.Tensor] = {}
        for concept, _ in self.concepts():
            vectors |= concept.embeddings
        self.tokens.set(vectors)
        activate(self.pipe, [place.name for x in self.loaded for place in x._places])
        if not self.loaded and hasattr(self.pipe, _HOST):
            delattr(self.pipe, _HOST)


class _Place:
    """An adapter that one concept after another lives in.

    Its scale stays what the first concept made it, since a compiled model takes it for a constant;
    other scales and weights are put into the factors.
    """

    def __init__(self, host: _Host, concept: Concept) -> None:
        meta = concept.meta
        refuse_misfits(host.pipe, concept)
        self._pipe, self.name = host.pipe, f"place-{host.taken}"
        host.taken += 1
        self._form = _form(concept)
        self._scale = scaling(meta.alpha, meta.rank)
        self._layers: dict[str, SboraLinear] = inject(
            host.pipe, self.name, list(concept.layers), meta.variant, meta.rank, meta.alpha,
            meta.start, meta.allocation_seed, merge_key=meta.digest,
        )  # fmt: skip

    def refuse_other_shape(self, concept: Concept) -> None:
        if _form(concept) != self._form:
            raise ConfigError(
                f"{concept.meta.name!r} has another variant, rank, layers or sizes than what it is "
                "to replace",
                "unload that and load the file",
            )

    @torch.no_grad()
    def fill(self, concept: Concept, weight: float) -> None:
        """Write the concept's numbers over what is there."""
        ratio = scaling(concept.meta.alpha, concept.meta.rank, weight) / self._scale
        adapter = adapter_name(self.name)
        for name, layer in self._layers.items():
            stored = concept.layers[name]
            layer.sbora_indices[adapter].copy_(stored.indices)
            layer.sbora_factor[adapter].copy_(stored.factor.float() * ratio)

    def clear(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says which adapter it makes active instead
            eject(self._pipe, self.name)


def _form(concept: Concept) -> Any:
    """What a compiled model depends on: variant, rank, and the sizes of the factors."""
    shapes = {name: tuple(layer.factor.shape) for name, layer in concept.layers.items()}
    return concept.meta.variant, concept.meta.rank, shapes


def _read(path: str | Path, weight: float) -> list[Weighted]:
    return [(concept, own * weight) for concept, own in read_concepts(path).concepts]
