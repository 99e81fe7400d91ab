"""A whole pipeline of each family, with its real structure, random weights and the pocket's words,
thin enough to be trained, merged, saved and drawn with in seconds."""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sbora_diffusion.diffusion.bases import Base

NAMES = ("sd2", "sdxl", "sd3")
T5_WORDS = [*"abcdefghijklmnopqrstuvwxyz<>_-0123456789", "▁", "▁a", "▁photo", "▁of"]


def thin_family(name: str, pocket: Base, with_t5: bool = True) -> Base:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"sd2": _sd2, "sdxl": _sdxl, "sd3": _sd3}[name]
        parts = made(copy.deepcopy(pocket.pipeline.tokenizer))
    pipeline = parts.pop("pipeline")(vae=_vae(16 if name == "sd3" else 4), **parts)
    if name == "sd3" and not with_t5:
        pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return Base("thin", pipeline, name)


def _sd2(tokenizer) -> dict:
    """v-prediction and linear projections, as 2.1 has them."""
    return {
        "pipeline": StableDiffusionPipeline,
        "text_encoder": CLIPTextModel(_clip(tokenizer, 1024)),
        "tokenizer": tokenizer,
        "unet": _unet(1024, use_linear_projection=True),
        "scheduler": DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sdxl(tokenizer) -> dict:
    return {
        "pipeline": StableDiffusionXLPipeline,
        "text_encoder": CLIPTextModel(_clip(tokenizer, 32)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(tokenizer, 48, projection_dim=40)),
        "tokenizer": tokenizer,
        "tokenizer_2": _padded_by_zero(tokenizer),
        "unet": _unet(
            80,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
            use_linear_projection=True,
        ),
        "scheduler": EulerDiscreteScheduler(),
    }


def _sd3(tokenizer) -> dict:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=72,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    t5 = T5Config(vocab_size=64, d_model=96, d_ff=64, d_kv=16, num_layers=1, num_heads=2)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in T5_WORDS)]
    return {
        "pipeline": StableDiffusion3Pipeline,
        "text_encoder": CLIPTextModelWithProjection(_clip(tokenizer, 32, projection_dim=32)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(tokenizer, 48, projection_dim=40)),
        "text_encoder_3": T5EncoderModel(t5),
        "tokenizer": tokenizer,
        "tokenizer_2": _padded_by_zero(tokenizer),
        "tokenizer_3": T5Tokenizer(vocab=words, extra_ids=0),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _clip(tokenizer, width: int, **more) -> CLIPTextConfig:
    """As older checkpoints have it: texts are said to end with token 2, and do not."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
        **more,
    )


def _unet(cross_attention: int, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=cross_attention,
        attention_head_dim=4,
        **more,
    )


def _vae(channels: int) -> AutoencoderKL:
    """Sixteen channels and a shift for Stable Diffusion 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            shift_factor=0.0609 if channels == 16 else None,
        )


def _padded_by_zero(tokenizer):
    """The second CLIP of Stable Diffusion XL pads with token 0."""
    twin = copy.deepcopy(tokenizer)
    twin.pad_token = twin.convert_ids_to_tokens(0)
    return twin
