"""Concepts on every attention layer of a pipeline of any family, and those layers' weights."""

import torch

from sbora_diffusion.core.concept import sealed
from sbora_diffusion.core.folded_set import FoldedSet
from sbora_diffusion.core.schema import Concept
from sbora_diffusion.diffusion.targets import adaptable, target_layers
from sbora_diffusion.diffusion.tokens import text_encoders
from tests.core.concept_examples import make_concept


def concept_for(pipeline, name, family, **changes):
    """A concept with random factors on every attention layer, and a token in each text encoder."""
    weights = {layer: module.weight for layer, module in target_layers(pipeline).items()}
    shapes = {layer: tuple(weight.shape) for layer, weight in weights.items()}
    made = make_concept(name, shapes=shapes, base=weights, family=family, base_name="", **changes)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    embeddings = {
        f"{part}.<{name}>": torch.randn(2, encoder.config.hidden_size, generator=generator)
        for part, encoder in text_encoders(pipeline).items()
    }
    return sealed(Concept(made.meta, made.layers, embeddings))


def weights_of(pipeline):
    return {name: layer.weight.detach().clone() for name, layer in target_layers(pipeline).items()}


def folded(pipeline, concepts):
    """The attention weights with the concepts folded in."""
    fold = FoldedSet(target_layers(pipeline))
    fold.switch(concepts)
    found = weights_of(pipeline)
    fold.switch([])
    return found


def loaded(pipeline, folder, name):
    """The attention weights after diffusers loaded and fused a LoRA; the base is restored."""
    before = weights_of(pipeline)
    pipeline.load_lora_weights(str(folder), weight_name=name)
    try:
        pipeline.fuse_lora(components=[part for part, _ in adaptable(pipeline)])
        fused = weights_of(pipeline)
    finally:
        pipeline.unload_lora_weights()
    for layer, module in target_layers(pipeline).items():
        module.weight.copy_(before[layer])
    return fused
