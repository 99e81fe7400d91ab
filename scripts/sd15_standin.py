"""The layers that concepts change in Stable Diffusion 1.5, with random weights: true names and
sizes (128 attention linears of the UNet, 48 of the text encoder, 49,408 word embeddings of 768),
nothing else of the model. For measuring and testing what depends on sizes alone.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sbora_diffusion.core.allocation import indices_for, slot_range
from sbora_diffusion.core.concept import Concept, ConceptMeta, LayerFactor, TokenMeta, sealed
from sbora_diffusion.diffusion.targets import target_layers

WORDS, WIDTH = 49408, 768


def standin(generator: torch.Generator) -> Any:
    """Something with the attributes `unet`, `text_encoder` and `tokenizer` of a pipeline.

    All but the attention linears and the word embeddings is without memory, on PyTorch's "meta"
    device. The weights are pieces of one random sequence, so that making them takes no time.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=WIDTH, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=WIDTH, intermediate_size=3072, vocab_size=WORDS)
        )
    pipeline = SimpleNamespace(unet=unet, text_encoder=text_encoder, tokenizer=_tokenizer())
    values = torch.randn(1 << 22, generator=generator) * 0.02
    for k, layer in enumerate(target_layers(pipeline).values()):
        offset, count = 997 * k, layer.weight.numel()
        weight = values[offset : offset + count].clone().view(layer.weight.shape)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    embedding = torch.zeros(WORDS, WIDTH)
    text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(embedding))
    return pipeline


def standin_concept(
    layers: dict[str, nn.Linear], name: str, variant: str, slot: int, rank: int = 8
) -> Concept:
    """A concept with random factors on all layers and a token of two vectors."""
    generator = torch.Generator().manual_seed(1000 + slot)
    start, stop = slot_range(slot, rank)
    axis = 1 if variant == "fa" else 0
    widths, factors = {}, {}
    for layer, linear in layers.items():
        shape = list(linear.weight.shape)
        widths[layer], shape[axis] = shape[axis], rank
        indices = indices_for(layer, widths[layer], start, stop, 0)
        factors[layer] = LayerFactor(indices, 0.01 * torch.randn(shape, generator=generator))
    meta = ConceptMeta(
        name=name,
        variant=variant,
        rank=rank,
        alpha=float(rank),
        slot=slot,
        start=start,
        stop=stop,
        family="sd1",
        fingerprint=dict.fromkeys(layers, "0" * 48),
        widths=widths,
        class_noun="toy",
        tokens=(TokenMeta(token=f"<{name}>", initializer="toy"),),
    )
    vectors = 0.05 * torch.randn(2, WIDTH, generator=generator)
    return sealed(Concept(meta, factors, {f"text_encoder.<{name}>": vectors}))


def _tokenizer() -> CLIPTokenizer:
    """As many words as CLIP's, invented."""
    letters = [chr(97 + k) for k in range(26)]
    pairs = [(first, second + "</w>") for first in letters for second in letters]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    fill = [f"{k}</w>" for k in range(WORDS - len(words) - 2)]
    vocabulary = [*words, *fill, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}, merges=pairs)
