"""A whole pipeline with Stable Diffusion 1.5's widths (text encoder and cross-attention 768, UNet
320 and 640) and random weights, thin enough to be saved in a second: one text layer, one UNet
block with attention on each side and one in the middle. Words and autoencoder are the pocket's.
"""

import copy

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sbora_diffusion.diffusion.bases import Base


def thin_sd15(pocket: Base) -> Base:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(320, 640),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(pocket.pipeline.tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=1,
                num_attention_heads=12,
                eos_token_id=2,  # as Stable Diffusion 1.5 has it
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
    return Base("thin", pipeline, "sd1")
