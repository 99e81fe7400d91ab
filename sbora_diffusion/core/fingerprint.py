"""Which base model a concept belongs to: three digests per adapted layer.

For each adapted layer of the unfolded base the values are hashed as they are, after rounding to
fp16, and after rounding to bf16. All three are hashed as fp32 bytes, so a copy that was rounded to
fp16 has, as its own values, exactly what the original gives after rounding to fp16. That tells a
rounded copy, in either direction, from a model that merely rounds to the same numbers.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from sbora_diffusion.core.errors import BaseMismatch

Fingerprint = dict[str, str]
"""Canonical layer name to 48 hexadecimal digits: the digests of the values in fp32, rounded to
fp16 and rounded to bf16, 64 bits (16 digits) each."""

DIGEST_DIGITS = 16
LAYER_DIGITS = 3 * DIGEST_DIGITS


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """Fingerprint the adapted layers of an unfolded base.

    Args:
        weights: (canonical layer name, weight) pairs, any order, dtype and device.
    """
    return {layer: layer_digest(weight) for layer, weight in weights}


def layer_digest(weight: torch.Tensor) -> str:
    """The three digests of one weight: `LAYER_DIGITS` hexadecimal digits."""
    values = weight.detach().to(device="cpu", dtype=torch.float32)
    rounded = (values, values.to(torch.float16), values.to(torch.bfloat16))
    return "".join(_digest(copy) for copy in rounded)


def compare(concept: Mapping[str, str], base: Mapping[str, str]) -> Literal["same", "rounded"]:
    """Is this the base that a concept was trained on?

    Args:
        concept: the fingerprint in the concept file.
        base: the fingerprint of the base at hand; further layers in it do not matter.

    Returns:
        "same" when every value agrees, however wide it is stored; "rounded" when some layer of the
        one is an fp16 or bf16 copy of the other's, which deserves a warning.

    Raises:
        BaseMismatch: names the first layer that differs or is missing, and how many do.
    """
    if concept.items() <= base.items():  # the usual case, and the quick one
        return "same"
    relations = {
        layer: _relation(digests, base.get(layer)) for layer, digests in sorted(concept.items())
    }
    for kind in ("missing", "different"):
        _refuse([layer for layer, found in relations.items() if found == kind], kind, len(concept))
    return "rounded" if "rounded" in relations.values() else "same"


def _relation(concept: str, base: str | None) -> str:
    if concept == base:
        return "same"
    if base is None:
        return "missing"
    (concept_values, *concept_rounded), (base_values, *base_rounded) = _split(concept), _split(base)
    if concept_values == base_values:
        return "same"
    if base_values in concept_rounded or concept_values in base_rounded:
        return "rounded"
    return "different"


def _split(digests: str) -> list[str]:
    return [digests[i : i + DIGEST_DIGITS] for i in range(0, LAYER_DIGITS, DIGEST_DIGITS)]


def _digest(values: torch.Tensor) -> str:
    raw = values.to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
    shape = ",".join(map(str, values.shape)).encode() + b";"
    return hashlib.sha256(shape + raw.tobytes()).hexdigest()[:DIGEST_DIGITS]


def _refuse(layers: list[str], kind: str, total: int) -> None:
    if layers:
        raise BaseMismatch(
            f"this is not the base the concept was trained on: {len(layers)} of {total} adapted "
            f"layers are {kind}, the first is {layers[0]!r}",
            "give the concept's own base with --base, or train the concept on this one",
        )
