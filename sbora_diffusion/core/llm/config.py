"""Settings of a training, and the paper's presets."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.settings import nearest

PRESETS = Path(__file__).with_name("presets")

Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "paged-adamw-32bit"]
Template = Literal["alpaca", "llm-adapters", "chat", "plain"]


class LlmConfig(BaseModel):
    """Everything that decides what one training gives. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "sbora-fa"
    rank: int = Field(32, ge=1)
    alpha: float | None = Field(
        None, gt=0, description="2 · rank without one; scale = alpha / rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field((), description="linear layers; those of the family if empty")
    slot: int = Field(0, ge=0, description="SBoRA: tasks in different slots are disjoint")
    allocation_seed: int = Field(0, ge=0)
    method_options: dict[str, Any] = Field({}, description="fields of the method's own in PEFT")

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    quantize: Literal["none", "nf4"] = "none"
    double_quant: bool = False

    template: Template = "alpaca"
    completion_only: bool = Field(True, description="no loss on the prompt")
    packing: bool = Field(False, description="several examples in one row, blind to each other")
    max_length: int = Field(256, ge=8, description="tokens of an example; longer ones are cut off")

    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1, description="optimizer steps in place of epochs")
    batch_size: int = Field(16, ge=1, description="examples of one optimizer step, all devices")
    micro_batch_size: int = Field(16, ge=1, description="examples at once on one device")
    rate: float = Field(2e-4, gt=0)
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup: int = Field(0, ge=0, description="steps")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 for any")
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    log_every: int = Field(10, ge=1, description="steps between two losses that are kept")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _batches_divide(self) -> "LlmConfig":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.double_quant and self.quantize == "none":
            raise ValueError("double_quant needs quantize = 'nf4'")
        return self

    @property
    def scaled_alpha(self) -> float:
        """alpha, 2 · rank without one."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def preset_names() -> list[str]:
    """The paper's experiments, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset: `training` for `LlmConfig`, `tasks`, `beams` and `max_new_tokens` for evaluation.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}", nearest(name, preset_names(), what="presets"))
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
