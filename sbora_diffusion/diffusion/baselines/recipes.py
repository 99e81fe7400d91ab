"""The recipes that the methods' authors publish, for Stable Diffusion 1.5.

Values are where a method starts from; on another base, and with these captions and placeholders,
learning rates and steps are tuned. Nothing but `SBORA` follows the project's default recipe: every
setting of the others is written down here. In all of them the factors' scale is 1 and a placeholder
stands in the place of the class noun. Not taken over from the authors' code: masks and attention
regularization (Mix-of-Show), resized references with captions that say so (Custom Diffusion), and
betas of (0.9, 0.999), for which the training loop has (0.9, 0.99).
"""

from typing import Any

from sbora_diffusion.diffusion.config import TrainConfig

_COMMON: dict[str, Any] = {
    "variant": "fa",
    "alpha": None,
    "targets": "all",
    "allocation_seed": 0,
    "gradient_accumulation": 1,
    "warmup_steps": 10,
    "schedule": "constant",
    "weight_decay": 0.0,
    "max_gradient_norm": 1.0,
    "dropout": 0.0,
    "vectors": None,
    "resolution": None,
    "aspect_buckets": False,
    "copies": 8,
    "flip": True,
    "optimizer": "adamw",
    "ema": 0.0,
    "masked_loss": False,
    "noise_offset": 0.0,
    "min_snr_gamma": None,
    "prior_weight": 0.0,
    "prior_images": 16,
    "preservation": 0.0,
    "preservation_rows": 1,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "save_dtype": "fp32",
    "seed": 0,
}
"""All that no source states otherwise; a test holds that no setting is missing."""
_SBORA = {"rank": 8, "steps": 400, "batch_size": 4, "rate_tokens": 1e-2, "rate_text_encoder": 5e-4}
_MIX_OF_SHOW = {
    "rank": 4,
    "rate_text_encoder": 1e-5,
    "rate_unet": 1e-4,
    "steps": 1000,  # of characters, batch 2 on 2 GPUs; objects have 500 of batch 1 on 2
    "batch_size": 4,
    "schedule": "cosine",  # theirs falls linearly to 0; this one has the same mean
    "weight_decay": 0.01,
}
"""What all options/train of TencentARC/Mix-of-Show, research_branch, agree in."""


def _recipe(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({**_COMMON, **settings})


SBORA = TrainConfig.model_validate({})
"""This project's default recipe."""

SBORA_FA = _recipe(**_SBORA, variant="fa", rate_unet=8e-4)
"""The paper states neither rank nor rates of its diffusion tables: those at which plain training,
without preservation, did best in this project's studies."""

SBORA_FB = _recipe(**_SBORA, variant="fb", rate_unet=5e-4)
"""As FA; the UNet's rate is the one at which rows did best in this project's study of crosstalk."""

LORA = _recipe(**_MIX_OF_SHOW, rate_tokens=5e-4)
"""The LoRA that Mix-of-Show compares with (options/train/LoRA/objects/Lora_catA_Cmix_B2_Iter500),
whose text alignment and image alignment are published; its word has one vector, here as many as
SBoRA's. diffusers' train_dreambooth_lora_sd15_advanced.py has rank 4 and 1e-4 in the UNet too, 5e-6
in the text encoder, and draws A with the deviation 1/r (here and in Mix-of-Show Kaiming's)."""

DORA = LORA
"""diffusers' scripts train it as LoRA, with `use_dora`; its authors publish no other recipe."""

LORA_FA = LORA
"""Published for language models alone."""

ORTHOGONAL = _recipe(
    **{**_MIX_OF_SHOW, "rank": 20, "rate_unet": 1e-5, "rate_text_encoder": 0.0},
    targets="unet",  # arXiv 2312.02432: linear layers; no rate for the text encoder is stated
    rate_tokens=1e-3,
    vectors=2,  # layer-wise, as Mix-of-Show's, on whose code it is built: hence also the steps
    noise_offset=0.01,
)
"""Rank times concepts must fit into the narrowest layer: 16 concepts of rank 20 at 320 inputs."""

MIX_OF_SHOW = _recipe(
    **_MIX_OF_SHOW,  # options/train/EDLoRA/characters/real/EDLoRA_potter_Cmix_B4_Iter1K
    rate_tokens=1e-3,
    vectors=2,  # <rand-0.013> and one from the class noun
    noise_offset=0.01,
)
RANDOM_FIRST = 0.9
"""Standard deviation of a random first vector at the start, as a share of the class noun's own.

Mix-of-Show's is 0.013 in CLIP ViT-L/14, where a word's is 0.4/√768 = 0.0144 (0.4 is the length to
which cloneofsimo/lora's training pulls new words); other text encoders have other lengths."""

CUSTOM_DIFFUSION = _recipe(
    targets="cross-attention",  # its keys and values alone, see `FullTraining`
    rank=1,  # without meaning: whole weights are trained
    rate_unet=8e-5,  # arXiv 2212.04488, Section 4; its src/diffusers_training.py multiplies 1e-5 by
    rate_tokens=8e-5,  # batch 2, 2 GPUs, and 2 for the class's pictures; one optimizer group
    rate_text_encoder=0.0,
    vectors=1,
    steps=250,
    batch_size=4,  # and 4 of the class: the 8 of the paper
    warmup_steps=0,
    prior_weight=1.0,
    prior_images=200,  # drawn by the base, scripts/finetune_gen.sh; by default they retrieve others
)
"""Weight decay, 1e-2 in its code, is left out: it would pull the whole weights to zero."""

TEXTUAL_INVERSION = _recipe(
    rank=1,  # without meaning: no layer is adapted
    rate_unet=0.0,
    rate_text_encoder=0.0,
    rate_tokens=2e-3,  # diffusers' examples/textual_inversion/README.md: 5e-4, with `scale_lr`
    batch_size=4,  # times batch 1, times 4 that are accumulated
    steps=3000,
    warmup_steps=0,
    weight_decay=0.01,  # textual_inversion.py, default, as the number of vectors
    vectors=1,
)
