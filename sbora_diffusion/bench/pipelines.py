"""Whole pipelines of true sizes with random weights and invented words: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbora_diffusion.bench.standin import WORDS, invented_tokenizer
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.runtime import USUAL, Runtime
from sbora_diffusion.diffusion.untrained import sd15_unet, sdxl_unet, tiny_sdxl_unet, tiny_unet

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Of Stable Diffusion 1 and XL."""


@dataclass(frozen=True)
class Sizes:
    """Of one pipeline.

    Attributes:
        unet: () → the denoiser.
        clips: width, layers and heads of each text encoder; all but the first project.
        blocks: widths of the autoencoder.
        words: of the vocabulary.
    """

    unet: Callable[[], nn.Module]
    clips: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, ...] = (128, 256, 512, 512)
    words: int = WORDS


CLIP_L, CLIP_G = (768, 12, 12), (1280, 32, 20)
TINY_BLOCKS, TINY_WORDS = (8, 8, 8, 8), 1000
SIZES = {
    "sd1": Sizes(sd15_unet, (CLIP_L,)),
    "sdxl": Sizes(sdxl_unet, (CLIP_L, CLIP_G)),
}
TINY = {
    "sd1": Sizes(lambda: tiny_unet(768), ((768, 1, 12),), TINY_BLOCKS, TINY_WORDS),
    "sdxl": Sizes(tiny_sdxl_unet, ((32, 1, 2), (32, 2, 2)), TINY_BLOCKS, TINY_WORDS),
}


def random_base(
    family: str,
    device: str,
    dtype: torch.dtype,
    tiny: bool = False,
    seed: int = 0,
    runtime: Runtime = USUAL,
) -> Base:
    """Stable Diffusion 1.5 ("sd1") or XL ("sdxl"); weights depend on seed and kind of device alone.

    Args:
        tiny: for rehearsals, the same structure with narrow layers.
    """
    sizes = (TINY if tiny else SIZES)[family]
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        models = _models(family, sizes)
    for model in models.values():
        model.to(device, dtype).requires_grad_(False).eval()
    pipeline = _pipeline(family, models, invented_tokenizer(sizes.words))
    pipeline.set_progress_bar_config(disable=True)
    return Base(f"random {family}", pipeline, family, runtime=runtime)


def _models(family: str, sizes: Sizes) -> dict[str, nn.Module]:
    first, *others = (_clip(size, sizes.words) for size in sizes.clips)
    encoders: dict[str, nn.Module] = {"text_encoder": CLIPTextModel(first)}
    for number, config in enumerate(others, 2):
        encoders[f"text_encoder_{number}"] = CLIPTextModelWithProjection(config)
    vae = AutoencoderKL(
        block_out_channels=sizes.blocks,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.blocks),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.blocks),
        layers_per_block=2,
        norm_num_groups=min(32, sizes.blocks[0]),
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    return {"unet": sizes.unet(), "vae": vae, **encoders}


def _clip(size: tuple[int, int, int], words: int) -> CLIPTextConfig:
    width, layers, heads = size
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )


def _pipeline(family: str, models: dict[str, nn.Module], tokenizer: Any) -> Any:
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **models, tokenizer=tokenizer, tokenizer_2=tokenizer,
            scheduler=EulerDiscreteScheduler(**NOISE),
        )  # fmt: skip
    return StableDiffusionPipeline(
        **models, tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, steps_offset=1),
    )  # fmt: skip
