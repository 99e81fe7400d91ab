"""Models of true sizes with random weights, built from configurations: nothing is downloaded."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from sbora_diffusion.diffusion.bases import load_base
from sbora_diffusion.diffusion.targets import by_component, target_layers
from sbora_diffusion.diffusion.untrained import sd15_unet, sdxl_unet, tiny_unet

LLAMA_TOKENS, LLAMA_LAYERS = 512, 2
LAYER_WIDTH, LAYER_TOKENS = 320, 4096
_LLAMA_ATTENTION = re.compile(r"\.self_attn\.[qkvo]_proj$")

Inputs = tuple[Tensor, ...]
Draw = Callable[[torch.Generator, int], Inputs]


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        title: for people.
        build: () → the model, which is called with what `inputs` gives, and gives one tensor.
        inputs: (generator, batch size) → inputs on the CPU; those of floating point get gradients.
        targets: model → names of its attention linears.
        batches: batch sizes that are measured by default.
        rank: by default.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Draw
    targets: Callable[[Any], list[str]]
    batches: tuple[int, ...] = (1, 4, 16)
    rank: int = 16


class Denoiser(nn.Module):
    """A UNet, called with latents (B, C, H, W), timesteps (B,), text states (B, tokens, dim) and,
    for SDXL, pooled text (B, dim) and sizes (B, 6)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, times: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        names = ("text_embeds", "time_ids")
        more = {"added_cond_kwargs": dict(zip(names, added, strict=True))} if added else {}
        return self.unet(latents, times, states, return_dict=False, **more)[0]


class TextDenoiser(nn.Module):
    """UNet and text encoder, called with latents, timesteps and token ids (B, tokens).

    The gradient reaches the word embeddings, as it does where a placeholder is learned.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        embedding: nn.Module = text_encoder.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(_ask_for_gradient)

    def forward(self, latents: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        states = self.text_encoder(ids)[0]
        return self.unet(latents, times, states, return_dict=False)[0]


class Decoder(nn.Module):
    """Decoder layers, called with the states of tokens (B, tokens, dim)."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(inputs_embeds=states, use_cache=False)[0]


def random_model(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """The model, frozen; its weights depend on the seed and the kind of device alone."""
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = shape.build()
    return model.to(device, dtype).requires_grad_(False).eval()


def random_inputs(
    shape: Shape, batch: int, device: str, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Inputs of one batch, floating-point ones in the model's dtype."""
    drawn = shape.inputs(torch.Generator().manual_seed(seed), batch)
    return [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in drawn]


def _ask_for_gradient(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
    return rows.detach().requires_grad_()


def _latents(side: int, states: tuple[int, int], added: int = 0) -> Draw:
    """Latents of 4 channels, timesteps and text states; for SDXL pooled text and sizes too."""

    def draw(generator: torch.Generator, batch: int) -> Inputs:
        latents = torch.randn(batch, 4, side, side, generator=generator)
        times = torch.randint(1000, (batch,), generator=generator)
        text = torch.randn(batch, *states, generator=generator)
        if not added:
            return latents, times, text
        pooled = torch.randn(batch, added, generator=generator)
        return latents, times, text, pooled, torch.full((batch, 6), 8.0 * side)

    return draw


def _pocket_inputs(generator: torch.Generator, batch: int) -> Inputs:
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    times = torch.randint(1000, (batch,), generator=generator)
    return latents, times, torch.randint(1000, (batch, 77), generator=generator)


def _states(tokens: int, width: int) -> Draw:
    def draw(generator: torch.Generator, batch: int) -> Inputs:
        return (torch.randn(batch, tokens, width, generator=generator),)

    return draw


def _llama8b() -> nn.Module:
    """The layers of Llama 3 8B (arXiv 2407.21783), two of 32, with a small vocabulary."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return Decoder(LlamaModel(config))


def _pocket() -> nn.Module:
    with torch.device("cpu"):
        pipeline = load_base("pocket", "cpu").pipeline
    return TextDenoiser(pipeline.unet, pipeline.text_encoder)


def _unet_targets(model: Any) -> list[str]:
    return list(target_layers(model, "unet"))


def _all_targets(model: Any) -> list[str]:
    split = by_component(model, list(target_layers(model)))
    return [f"{part}.{path}" for part, paths in split.items() for path in paths.values()]


def _llama_targets(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if _LLAMA_ATTENTION.search(name)]


def layer_shape(width: int = LAYER_WIDTH, tokens: int = LAYER_TOKENS) -> Shape:
    """One linear layer without bias, its input (1, tokens, width)."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width, bias=False))

    title = f"one layer, {width} wide, {tokens} tokens"
    return Shape(title, build, _states(tokens, width), lambda _: ["0"], (1,))


SHAPES = {
    "sd15": Shape(
        "Stable Diffusion 1.5, 512 px", lambda: Denoiser(sd15_unet()),
        _latents(64, (77, 768)), _unet_targets,
    ),
    "sdxl": Shape(
        "Stable Diffusion XL, 1024 px", lambda: Denoiser(sdxl_unet()),
        _latents(128, (77, 2048), 1280), _unet_targets, (1, 4),
    ),
    "llama8b": Shape(
        f"Llama 3 8B, {LLAMA_LAYERS} layers, {LLAMA_TOKENS} tokens",
        _llama8b, _states(LLAMA_TOKENS, 4096), _llama_targets,
    ),
    "pocket": Shape("pocket, 128 px", _pocket, _pocket_inputs, _all_targets, (4,), rank=8),
    "tiny": Shape(
        "a rehearsal", lambda: Denoiser(tiny_unet()), _latents(8, (5, 32)), _unet_targets,
        (1, 2), rank=2,
    ),
}  # fmt: skip
