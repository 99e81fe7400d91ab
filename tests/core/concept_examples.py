"""Small valid concepts for the tests of the concept file and of what is built on it."""

from typing import Any

import torch

from sbora_diffusion.core.allocation import indices_for, slot_range
from sbora_diffusion.core.concept import Concept, ConceptMeta, LayerFactor, TokenMeta
from sbora_diffusion.core.fingerprint import fingerprint

SHAPES = {  # canonical name: (out, in)
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (16, 24),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (20, 16),
}


def make_base(shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_concept(
    name: str = "robot",
    variant: str = "fa",
    rank: int = 4,
    slot: int = 0,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    base: dict[str, torch.Tensor] | None = None,
    **changes: Any,
) -> Concept:
    """A concept with random factors on every layer of `shapes`, and one token of two vectors."""
    generator = torch.Generator().manual_seed(slot)
    start, stop = slot_range(slot, rank)
    widths = {layer: shape[1 if variant == "fa" else 0] for layer, shape in shapes.items()}
    layers = {}
    for layer, (outputs, inputs) in shapes.items():
        shape = (outputs, rank) if variant == "fa" else (rank, inputs)
        layers[layer] = LayerFactor(
            indices_for(layer, widths[layer], start, stop, 0),
            torch.randn(shape, generator=generator),
        )
    token = f"<{name}>"
    settings = {
        "name": name,
        "variant": variant,
        "rank": rank,
        "alpha": 4.0,
        "slot": slot,
        "start": start,
        "stop": stop,
        "family": "pocket",
        "base_name": "pocket",
        "fingerprint": fingerprint((base or make_base(shapes)).items()),
        "widths": widths,
        "class_noun": "toy",
        "tokens": (TokenMeta(token=token, initializer="toy"),),
        "training": {"steps": 150, "learning_rate": 1e-3, "flip": True, "optimizer": "adamw"},
    }
    embeddings = {f"text_encoder.{token}": torch.randn(2, 16, generator=generator)}
    return Concept(ConceptMeta(**(settings | changes)), layers, embeddings)
