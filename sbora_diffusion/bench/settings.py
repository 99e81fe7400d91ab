"""The settings of `sbora bench speed`, and the names by which its records are known."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

WHAT = "what training and merging cost with SBoRA and with other adapters, over the frozen model"
FLOOR = "frozen"

Mode = Literal["eager", "compiled", "graphs"]


class SpeedConfig(BaseModel):
    """How much is measured, and of what size. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int | None = Field(None, ge=1, le=1024, description="each shape's own by default")
    batches: list[int] | None = Field(None, min_length=1, description="each shape's own by default")
    modes: list[Mode] = Field(["eager"], min_length=1, description="how a training step is run")
    dtype: Literal["fp32", "fp16", "bf16"] | None = Field(
        None, description="of the base; bf16 on a GPU, fp32 elsewhere by default"
    )
    rounds: int = Field(20, ge=2, le=10_000, description="turns of each contestant in a step")
    layer_rounds: int = Field(41, ge=2, le=10_000, description="turns in one layer")
    layer_width: int = Field(320, ge=32, le=1 << 16, description="of the one layer")
    layer_tokens: int = Field(4096, ge=1, le=1 << 20, description="rows of its input")
    merge_rounds: int = Field(9, ge=2, le=10_000, description="repetitions of merging")
    warm_up: int = Field(2, ge=1, le=100, description="turns before those that count")
    seconds: float = Field(60.0, gt=0, description="no new round of a batch size after these")
    limit: float | None = Field(
        None, gt=0, description="seconds of the whole run; what has not begun then is left out"
    )
    concepts: int = Field(14, ge=2, le=1000, description="how many are merged, or train at once")
    mixed_rows: int = Field(16, ge=1, le=1024, description="of a batch of different concepts")
    training_steps: int = Field(300, ge=1, le=1_000_000, description="of concepts that train")
    threads: int | None = Field(None, ge=1, le=1024, description="of the CPU; torch's by default")
    seed: int = Field(0, ge=0, lt=1 << 63)
