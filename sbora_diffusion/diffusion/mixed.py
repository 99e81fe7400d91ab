"""Drawing prompts that call different concepts in one pass of the pipeline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.folded_set import Weighted, concept_updates, refuse_bad_weight
from sbora_diffusion.core.functional import VARIANTS, Variant
from sbora_diffusion.core.mixed import Bank, stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.core.mixed_weights import folded_weights
from sbora_diffusion.core.updates import Update
from sbora_diffusion.diffusion.adapters import refuse_misfits
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.drawing import Kept
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.prompts import tokens_in
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens


class MixedSampler:
    """A `Sampler` under which each prompt has its own concepts, none or several.

    Concepts of different prompts may share indices; those of one prompt are summed, as when they
    are attached together. The unconditional half of a row has the row's concepts too. Pictures are,
    up to rounding, those of drawing prompt by prompt.

    Args:
        concepts_for: prompt → its concepts, with weights.
    """

    def __init__(self, concepts_for: Callable[[str], Sequence[Weighted]]):
        self._concepts_for = concepts_for

    def __call__(
        self,
        base: Base,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        negative_prompt: str,
        on_step: Callable[[int], None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Latents (B, C, H, W); raises what `mixed_concepts` raises, and ConfigError for a token in
        the negative prompt, which would mean something for some of the rows alone."""
        if found := tokens_in(negative_prompt):
            raise ConfigError(
                f"{found[0]} in a negative prompt for different concepts", "draw them one by one"
            )
        concepts = [self._concepts_for(prompt) for prompt in prompts]
        with mixed_concepts(base, concepts, base.repeats):
            return draw_latents(
                base, prompts, seeds, steps, guidance, negative_prompt, on_step, size
            )


@contextmanager
def mixed_concepts(
    base: Base, rows: Sequence[Sequence[Weighted]], stay: bool = False
) -> Iterator[None]:
    """Within, row k of a batch has the concepts rows[k], in text encoder and UNet.

    Batches have len(rows) rows or a multiple, row k + len(rows) being another half of row k. What
    is attached or folded already acts on all rows, and stays as it is meanwhile.

    Args:
        stay: put factors, indices and folded weights where those of an earlier batch were, so that
            what was recorded or compiled for one batch computes others of its shape; such blocks
            cannot be nested.

    Raises:
        BaseMismatch: a concept belongs to another base.
        ConflictError: two concepts have one token, or two of one row share a name or indices.
        ConfigError: a weight is not finite.
        FormatError: a factor or an embedding does not fit the base.
        Nothing is changed then, and nothing afterwards.
    """
    _refuse_misfits(base, rows)
    vectors = _vectors([concept for row in rows for concept, _ in row])
    entries: dict[tuple[tuple[str, float], ...], list[Weighted]] = {}
    for row in rows:
        entries.setdefault(_key(row), sorted(row, key=lambda pair: pair[0].meta.digest))
    order = list(entries)
    chosen = torch.tensor([order.index(_key(row)) for row in rows], device=base.device)
    unused: list[list[Weighted]] = [[]] * (len(rows) - len(entries)) if stay else []
    banks = _banks(base, [*entries.values(), *unused])
    if stay:
        banks, chosen = _placed(banks, chosen, base.recorded.kept)
    tokens = PlaceholderTokens(base.pipeline)
    tokens.add(vectors)
    try:
        weights = _weights(base, banks, chosen, stay)
        with mixed_rows(target_layers(base.pipeline), banks, chosen, not stay, weights):
            yield
    finally:
        tokens.set({})


def _vectors(concepts: Sequence[Concept]) -> dict[str, Tensor]:
    owners: dict[str, str] = {}
    vectors: dict[str, Tensor] = {}
    for concept in concepts:
        for name, rows in concept.embeddings.items():
            if owners.setdefault(name, concept.meta.digest) != concept.meta.digest:
                token = name.partition(".")[2]
                raise ConflictError(f"{token} is the token of two concepts", "rename one of them")
            vectors[name] = rows
    return vectors


def _key(row: Sequence[Weighted]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((concept.meta.digest, weight) for concept, weight in row))


def _refuse_misfits(base: Base, rows: Sequence[Sequence[Weighted]]) -> None:
    for row in rows:
        check_mergeable([concept for concept, _ in row])
        for concept, weight in row:
            refuse_bad_weight(weight)
            compare(concept.meta.fingerprint, base.fingerprint)
            refuse_misfits(base.pipeline, concept)


def _banks(base: Base, entries: Sequence[Sequence[Weighted]]) -> dict[str, list[Bank]]:
    """Canonical name → one bank for each variant that occurs there, with one entry for each set."""
    updates = [[concept_updates(concept, weight) for concept, weight in row] for row in entries]
    banks: dict[str, list[Bank]] = {}
    for name, layer in target_layers(base.pipeline).items():
        groups = [[found[name] for found in row if name in found] for row in updates]
        shape = (layer.out_features, layer.in_features)
        for variant in VARIANTS:
            of_variant = [_of_variant(group, variant) for group in groups]
            if any(of_variant):
                bank = stacked(variant, of_variant, shape, layer.weight)
                banks.setdefault(name, []).append(bank)
    return banks


def _weights(
    base: Base, banks: Mapping[str, Sequence[Bank]], rows: Tensor, stay: bool
) -> dict[str, Tensor]:
    """Folded weights of the UNet's layers; those of the text encoder would be used once."""
    layers = target_layers(base.pipeline, "unet")
    own = {name: parts for name, parts in banks.items() if name in layers}
    if not stay:
        return folded_weights(layers, own, rows)
    kept = base.recorded.weights
    return folded_weights(layers, own, rows, kept.room, kept.nbytes)


def _placed(
    banks: Mapping[str, Sequence[Bank]], rows: Tensor, kept: Kept
) -> tuple[dict[str, list[Bank]], Tensor]:
    """The same banks and rows, in tensors that stay."""
    flat = [t for own in banks.values() for bank in own for t in _tensors(bank)]
    rows, *placed = kept.put([rows, *flat])
    parts = iter(zip(*[iter(placed)] * 3, strict=True))
    return {
        name: [Bank(bank.variant, *next(parts)) for bank in own] for name, own in banks.items()
    }, rows


def _tensors(bank: Bank) -> tuple[Tensor, Tensor, Tensor]:
    return bank.factor, bank.indices, bank.scale


def _of_variant(group: Sequence[Update], variant: Variant) -> list[Update]:
    return [update for update in group if update.variant == variant]
