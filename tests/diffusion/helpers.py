"""Concepts with strong random factors on a real base, and what a base consists of, in bytes."""

from pathlib import Path
from unittest.mock import Mock

import torch

from sbora_diffusion.core import mixed_layers, mixed_weights
from sbora_diffusion.core.allocation import indices_for, slot_range
from sbora_diffusion.core.concept import (
    Concept,
    ConceptMeta,
    LayerFactor,
    TokenMeta,
    read_concept,
    write_concept,
)
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.targets import target_layers

CONCEPTS = Path(__file__).parents[2] / "concepts"
PARTS = ("unet", "text_encoder", "vae")


def snapshot(base: Base) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of every component, copied."""
    return {
        f"{part}.{key}": value.detach().clone()
        for part in PARTS
        for key, value in getattr(base.pipeline, part).state_dict().items()
    }


def assert_untouched(base: Base, before: dict[str, torch.Tensor]) -> None:
    """The base has the names, bytes and vocabulary of `before`."""
    now = snapshot(base)
    assert now.keys() == before.keys()
    assert [key for key in now if not torch.equal(now[key], before[key])] == []
    rows = base.pipeline.text_encoder.get_input_embeddings().num_embeddings
    assert len(base.pipeline.tokenizer) == base.pipeline.text_encoder.config.vocab_size == rows


def strong_concept(
    base: Base,
    folder: Path,
    name: str,
    variant: str = "fa",
    slot: int = 0,
    rank: int = 8,
    vectors: int = 2,
    **changes,
) -> Concept:
    """A concept whose random factors clearly change pictures, written to a file and read back."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    start, stop = slot_range(slot, rank)
    layers, widths = {}, {}
    for layer, linear in target_layers(base.pipeline).items():
        shape = list(linear.weight.shape)
        axis = 1 if variant == "fa" else 0
        widths[layer], shape[axis] = shape[axis], rank
        indices = indices_for(layer, widths[layer], start, stop, 0)
        layers[layer] = LayerFactor(indices, 0.03 * torch.randn(shape, generator=generator))
    token = f"<{name}>"
    settings = {
        "name": name,
        "variant": variant,
        "rank": rank,
        "alpha": float(rank),
        "slot": slot,
        "start": start,
        "stop": stop,
        "family": base.family,
        "base_name": base.public_name,
        "fingerprint": base.fingerprint,
        "widths": widths,
        "class_noun": "toy",
        "tokens": (TokenMeta(token=token, initializer="toy"),),
    }
    width = base.pipeline.text_encoder.config.hidden_size
    embeddings = {f"text_encoder.{token}": 0.05 * torch.randn(vectors, width, generator=generator)}
    meta = ConceptMeta(**(settings | changes))
    path = folder / f"{name}.safetensors"
    write_concept(path, Concept(meta, layers, embeddings))
    return read_concept(path)


def fold_from(monkeypatch, tokens: int) -> Mock:
    """Fold mixed batches from so many tokens a row on; the calls with folded weights."""
    products = Mock(wraps=mixed_weights.linear_rows)
    monkeypatch.setattr(mixed_layers, "linear_rows", products)
    monkeypatch.setattr(mixed_weights, "FOLD_FROM", tokens)
    return products


def strong_concepts(base: Base, folder: Path) -> dict[str, Concept]:
    """FA concepts in two slots, an FB concept, and one that overlaps the first."""
    kinds = {"one": ("fa", 0), "two": ("fa", 1), "rows": ("fb", 0), "double": ("fa", 0)}
    return {n: strong_concept(base, folder, n, v, s) for n, (v, s) in kinds.items()}
