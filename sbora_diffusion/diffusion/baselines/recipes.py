"""The recipes that the methods' authors publish, for Stable Diffusion 1.5.

Values are where a method starts from; on another base, and with these captions and placeholders,
learning rates and steps are tuned. What a source leaves open is this project's default. In all of
them the factors' scale is alpha / rank = 1 and a placeholder stands in the place of the class noun.
"""

from typing import Any

from sbora_diffusion.diffusion.config import TrainConfig


def _recipe(**changes: Any) -> TrainConfig:
    """The project's default recipe with changes."""
    return TrainConfig.model_validate(changes)


SBORA = _recipe()
"""This project's default recipe."""

SBORA_FA = _recipe(variant="fa")
"""The paper states neither rank nor rates of its diffusion tables: this project's defaults."""

SBORA_FB = _recipe(variant="fb", rate_unet=5e-4)
"""As FA; the UNet's rate is the one at which rows did best in this project's study of crosstalk."""

LORA = _recipe(
    rank=4,  # diffusers' train_text_to_image_lora.py and train_dreambooth_lora.py, default; α = r
    rate_unet=1e-4,  # diffusers' train_dreambooth_lora_sd15_advanced.py, default
    rate_text_encoder=5e-6,  # the same
    rate_tokens=5e-4,  # diffusers' textual_inversion.py, README
)

DORA = LORA
"""Its authors' text-to-image example is the same script with `use_dora`."""

LORA_FA = LORA
"""Published for language models alone."""

ORTHOGONAL = _recipe(
    targets="unet",  # arXiv 2312.02432: all linear layers of the UNet's attention; no rate for the
    rate_text_encoder=0.0,  # text encoder is stated
    rank=20,
    rate_unet=1e-5,
    rate_tokens=1e-3,
    vectors=2,
    steps=1000,  # not stated ("10 to 15 minutes on two GPUs"): those of Mix-of-Show, whose code it
    batch_size=4,  # is built on, as are the next three
    noise_offset=0.01,
)

MIX_OF_SHOW = _recipe(
    rank=4,  # arXiv 2305.18292, supplement
    rate_tokens=1e-3,
    rate_text_encoder=1e-5,
    rate_unet=1e-4,
    vectors=2,  # <rand-0.013> and one from the class noun
    steps=1000,  # of characters, batch 4; objects: 500 steps of batch 2
    batch_size=4,
    noise_offset=0.01,  # the research branch's configurations
)
RANDOM_FIRST = 0.013
"""Standard deviation of Mix-of-Show's first vector at the start."""

CUSTOM_DIFFUSION = _recipe(
    targets="cross-attention",  # its keys and values alone, see `FullTraining`
    rank=1,  # without meaning: whole weights are trained
    rate_unet=4e-5,  # arXiv 2212.04488: 1e-5, times batch size (`scale_lr`)
    rate_tokens=4e-5,  # the same optimizer group
    vectors=1,
    steps=250,
    batch_size=4,
    prior_weight=1.0,
    prior_images=200,  # drawn by the base, where the authors retrieve real ones by default
)
"""Weight decay, 1e-2 in its code, is left out: it would pull the whole weights to zero."""

TEXTUAL_INVERSION = _recipe(
    rank=1,  # without meaning: no layer is adapted
    rate_unet=0.0,
    rate_text_encoder=0.0,
    rate_tokens=2e-3,  # diffusers' textual_inversion.py, README: 5e-4 times batch size
    batch_size=4,
    steps=3000,  # the same
    vectors=1,
)
