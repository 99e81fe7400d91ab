"""A pipeline around the pocket's words and autoencoder with random weights, thin enough to be
trained and recorded in a second: two text layers, a UNet with attention on each side."""

import copy

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sbora_diffusion.diffusion.bases import Base


def thin_pocket(pocket: Base, depth: int = 2) -> Base:
    """The same weights each time.

    Args:
        depth: 2, or 1 for a compiler's sake: one text layer, one block on each side of the UNet
            and none in the middle.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64)[-depth:],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-depth:],
            mid_block_type="UNetMidBlock2DCrossAttn" if depth > 1 else None,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:depth],
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(pocket.pipeline.tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=depth,
                num_attention_heads=4,
                eos_token_id=pocket.pipeline.text_encoder.config.eos_token_id,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(pocket.pipeline.vae),
        text_encoder=text_encoder.eval(),
        tokenizer=copy.deepcopy(pocket.pipeline.tokenizer),
        unet=unet.eval(),
        scheduler=copy.deepcopy(pocket.pipeline.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False)
    return Base("thin", pipeline, "pocket")
