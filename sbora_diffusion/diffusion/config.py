"""The training configuration; the defaults are the recipe of `sbora train`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sbora_diffusion.core.functional import Variant
from sbora_diffusion.diffusion.optimizers import OptimizerName
from sbora_diffusion.diffusion.targets import Targets


class TrainConfig(BaseModel):
    """Everything that decides what one training gives. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    variant: Variant = Field("fa", description="fa: columns, fb: rows")
    rank: int = Field(8, ge=1, le=1024, description="indices per layer")
    alpha: float | None = Field(None, gt=0, description="scale = alpha / rank; rank by default")
    targets: Targets = Field("all", description="which attention layers are adapted")
    allocation_seed: int = Field(0, ge=0, description="same for all concepts that shall merge")
    steps: int = Field(400, ge=1, le=1_000_000)
    batch_size: int = Field(8, ge=1, le=1024)
    gradient_accumulation: int = Field(1, ge=1, le=1024)
    rate_tokens: float = Field(1e-2, ge=0, description="learning rate of the placeholder")
    rate_text_encoder: float = Field(2e-3, ge=0)
    rate_unet: float = Field(3e-3, ge=0)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw8bit keeps moments in 8 bits; prodigy finds the rate by itself, and of "
        "the rates only those that are 0 count",
    )
    weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average that the concept is; 0 for none"
    )
    max_gradient_norm: float = Field(1.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    vectors: int | None = Field(
        None, ge=1, le=16, description="placeholder vectors; 4, or all of a longer class noun's"
    )
    resolution: int | None = Field(None, ge=32, le=4096, description="the base's by default")
    aspect_buckets: bool = Field(
        False,
        description="pictures keep about their aspect, at the area of the square; without, they "
        "are cut to squares",
    )
    copies: int = Field(8, ge=1, le=256, description="cached crops made from each reference")
    flip: bool = True
    masked_loss: bool = Field(
        False, description="only what a reference's transparency leaves visible counts"
    )
    noise_offset: float = Field(0.0, ge=0, le=1)
    min_snr_gamma: float | None = Field(None, gt=0, description="arXiv 2303.09556; 5 is usual")
    prior_weight: float = Field(0.0, ge=0, description="loss on pictures of the bare class noun")
    prior_images: int = Field(16, ge=1, le=10_000)
    preservation: float = Field(
        1.0, ge=0, description="loss that keeps generic prompts as the frozen base draws them"
    )
    preservation_rows: int = Field(1, ge=1, le=1024, description="generic rows beside each batch")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="of the concept file")
    seed: int = Field(0, ge=0, lt=1 << 63)

    @property
    def resolved_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class DrawConfig(BaseModel):
    """Everything beside prompt and model that decides pictures of the base's own size."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=1 << 63, description="picture k uses seed + k")
    num: int = Field(1, ge=1, le=10_000, description="how many pictures")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(4.0, ge=0, description="guidance scale; 1 and less is none")
    negative_prompt: str = ""


class PictureConfig(DrawConfig):
    """The same for `sbora generate`, whose pictures may have any size."""

    width: int | None = Field(None, ge=8, le=8192, description="the base's by default")
    height: int | None = Field(None, ge=8, le=8192, description="the base's by default")
