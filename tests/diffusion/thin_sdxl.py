"""SDXL's pipeline with random weights, thin enough for a test: two text encoders of one layer and,
by which diffusers tells them apart in a single file, two widths, a UNet with Stability's number of
blocks. Words and autoencoder are the pocket's."""

import copy

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbora_diffusion.diffusion.bases import Base


def thin_sdxl(pocket: Base, eos_token_id: int | None = None) -> StableDiffusionXLPipeline:
    """The same weights each time.

    Args:
        eos_token_id: of the text encoders' configurations, by default the tokenizer's own.
    """
    tokenizer = pocket.pipeline.tokenizer
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "eos_token_id": tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=copy.deepcopy(pocket.pipeline.vae),
            text_encoder=CLIPTextModel(CLIPTextConfig(**sizes)),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(**sizes | {"hidden_size": 48})
            ),
            tokenizer=copy.deepcopy(tokenizer),
            tokenizer_2=copy.deepcopy(tokenizer),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 32, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                transformer_layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=4,
                cross_attention_dim=32 + 48,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            ),
            scheduler=copy.deepcopy(pocket.pipeline.scheduler),
        )
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False).eval()
    return pipeline
