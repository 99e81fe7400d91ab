"""Concepts on every attention layer of a pipeline of any family, and those layers' weights."""

import torch

from sbora_diffusion.core.concept import sealed
from sbora_diffusion.core.folded_set import FoldedSet
from sbora_diffusion.core.schema import Concept
from sbora_diffusion.diffusion.targets import name_prefix
from tests.core.concept_examples import make_concept

PARTS = ("unet", "text_encoder", "text_encoder_2")
ENDS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def linears(pipeline):
    """Canonical name → attention layer."""
    models = {part: getattr(pipeline, part, None) for part in PARTS}
    return {
        name_prefix(part, model) + path: getattr(module, "base_layer", module)
        for part, model in models.items()
        if model is not None
        for path, module in model.named_modules()
        if path.endswith(ENDS) and "attn" in path
    }


def concept_for(pipeline, name, family, **changes):
    """A concept with random factors on every attention layer, and a token in each text encoder."""
    weights = {layer: module.weight for layer, module in linears(pipeline).items()}
    shapes = {layer: tuple(weight.shape) for layer, weight in weights.items()}
    made = make_concept(name, shapes=shapes, base=weights, family=family, base_name="", **changes)
    encoders = [part for part in PARTS[1:] if getattr(pipeline, part, None) is not None]
    embeddings = {
        f"{part}.<{name}>": torch.randn(2, getattr(pipeline, part).config.hidden_size)
        for part in encoders
    }
    return sealed(Concept(made.meta, made.layers, embeddings))


def weights_of(pipeline):
    return {name: layer.weight.detach().clone() for name, layer in linears(pipeline).items()}


def folded(pipeline, concepts):
    """The attention weights with the concepts folded in."""
    fold = FoldedSet(linears(pipeline))
    fold.switch(concepts)
    found = weights_of(pipeline)
    fold.switch([])
    return found
