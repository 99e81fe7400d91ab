"""UNets built from their configurations, with random weights: for measuring, nothing is loaded."""

from diffusers import UNet2DConditionModel


def sd15_unet(cross_attention: int = 768) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's: 64×64 latents, 128 attention linears, 320 wide at the narrowest."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=cross_attention, attention_head_dim=8
    )


def sdxl_unet() -> UNet2DConditionModel:
    """Stable Diffusion XL base 1.0's (arXiv 2307.01952): 128×128 latents, 560 attention linears."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def tiny_unet(cross_attention: int = 32) -> UNet2DConditionModel:
    """For rehearsals: 8×8 latents, 32 attention linears, 32 wide at the narrowest."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=cross_attention,
        attention_head_dim=4,
    )


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """For rehearsals: told sizes and pooled text as Stable Diffusion XL's is; two text encoders 32
    wide."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
