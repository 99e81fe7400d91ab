"""The layers that concepts change in Stable Diffusion 1.5, with random weights: true names and
sizes (128 attention linears of the UNet, 48 of the text encoder, 49,408 word embeddings of 768),
nothing else of the model. For measuring and testing what depends on sizes alone.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sbora_diffusion.core.allocation import indices_for, slot_range
from sbora_diffusion.core.concept import Concept, ConceptMeta, LayerFactor, TokenMeta, sealed
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.untrained import sd15_unet

WORDS, WIDTH = 49408, 768


def standin(
    generator: torch.Generator,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    words: int = WORDS,
    unet_of: Callable[[int], nn.Module] = sd15_unet,
) -> Any:
    """Something with the attributes `unet`, `text_encoder` and `tokenizer` of a pipeline.

    All but the attention linears and the word embeddings is without memory, on PyTorch's "meta"
    device. The weights are pieces of one random sequence, so that making them takes no time.

    Args:
        width: of text states and word embeddings.
        words: of the vocabulary; 730 or more.
        unet_of: the width of text states → a UNet.
    """
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 64),
        vocab_size=words,
    )
    with torch.device("meta"):
        unet, text_encoder = unet_of(width), CLIPTextModel(config)
    pipeline = SimpleNamespace(
        unet=unet, text_encoder=text_encoder, tokenizer=invented_tokenizer(words)
    )
    values = torch.randn(1 << 22, generator=generator) * 0.02
    for k, layer in enumerate(target_layers(pipeline).values()):
        offset, count = 997 * k, layer.weight.numel()
        weight = values[offset : offset + count].clone().view(layer.weight.shape)
        layer.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    embedding = torch.zeros(words, width, device=device, dtype=dtype)
    text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(embedding))
    return pipeline


def standin_concept(
    layers: dict[str, nn.Linear],
    name: str,
    variant: Variant,
    slot: int,
    rank: int = 8,
    width: int = WIDTH,
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
        allocation_seed=0,
        family="sd1",
        fingerprint=dict.fromkeys(layers, "0" * 48),
        widths=widths,
        class_noun="toy",
        tokens=(TokenMeta(token=f"<{name}>", initializer="toy"),),
    )
    vectors = 0.05 * torch.randn(2, width, generator=generator)
    return sealed(Concept(meta, factors, {f"text_encoder.<{name}>": vectors}))


def invented_tokenizer(count: int) -> CLIPTokenizer:
    """So many words, invented."""
    letters = [chr(97 + k) for k in range(26)]
    pairs = [(first, second + "</w>") for first in letters for second in letters]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    fill = [f"{k}</w>" for k in range(count - len(words) - 2)]
    vocabulary = [*words, *fill, "<|startoftext|>", "<|endoftext|>"]
    numbers: Any = {word: k for k, word in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=pairs, model_max_length=77)  # type: ignore[arg-type]
