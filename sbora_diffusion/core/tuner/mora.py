"""MoRA, which PEFT lacks: a square matrix in place of two low-rank factors (arXiv 2405.12130).

ΔW x = decompress(M · compress(x)) with M (r̂, r̂), r̂ = √((in + out) · r): as many trained parameters
as LoRA of rank r, and an update of rank up to r̂. Compression is the paper's Equation 9: x is cut
into groups of r̂, each is rotated by its number as positions are in RoPE, all pass through M, and
the results stand one after another. What is too short for the last group or for the output starts
again from its beginning, what is too long is cut off.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional as F

from sbora_diffusion.core.errors import ConfigError


class MoraPeftType(str, Enum):  # noqa: UP042 - see SboraPeftType
    MORA = "MORA"


@dataclass
class MoraConfig(PeftConfig):
    """MoRA on the linear layers of a model.

    Args:
        r: the rank of the LoRA that has as many parameters.
        dropout: probability, on the input of the update.
        target_modules, exclude_modules: as everywhere in PEFT.

    Raises:
        ConfigError: a value is out of its range.
    """

    r: int = 8
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MoraPeftType.MORA
        if self.r < 1:
            raise ConfigError(f"r must be 1 or more, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")


def square_side(inputs: int, outputs: int, rank: int) -> int:
    """r̂, the even number nearest above √((in + out) · r): a rotation takes entries in pairs."""
    side = math.isqrt((inputs + outputs) * rank)
    return side + side % 2


def update(x: Tensor, matrix: Tensor, outputs: int) -> Tensor:
    """decompress(M · compress(x)).

    Args:
        x: (..., in).
        matrix: M, (r̂, r̂), r̂ even.

    Returns:
        (..., outputs).
    """
    side = matrix.shape[0]
    groups = -(-x.shape[-1] // side)
    cut = _fitted(x, groups * side).unflatten(-1, (groups, side))
    return _fitted((_rotated(cut) @ matrix.T).flatten(-2), outputs)


def _fitted(x: Tensor, width: int) -> Tensor:
    """Repeated from its beginning, or cut off, to a width."""
    times = -(-width // x.shape[-1])
    return torch.cat([x] * times, dim=-1)[..., :width] if times > 1 else x[..., :width]


def _rotated(groups: Tensor) -> Tensor:
    """Each group (..., groups, r̂) turned by its number, in halves as RoPE turns positions."""
    count, side = groups.shape[-2:]
    options: Any = {"device": groups.device, "dtype": torch.float32}
    rates = 10000.0 ** (-torch.arange(0, side, 2, **options) / side)
    angles = torch.outer(torch.arange(count, **options), rates).repeat(1, 2)
    a, b = groups.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return groups * angles.cos().to(groups.dtype) + turned * angles.sin().to(groups.dtype)


class MoraLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + Σ over the active adapters of decompress(M · compress(x)).

    Merging keeps the base's bytes, so that `unmerge` gives them back.

    Raises:
        ConfigError: the base layer is not linear.
    """

    adapter_layer_names = ("mora_matrix",)
    other_param_names = ("r", "dropouts")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        if not isinstance(self.get_base_layer(), nn.Linear):
            raise ConfigError(
                f"MoRA adapts nn.Linear, found a {type(base_layer).__name__}",
                "leave it out of target_modules",
            )
        self.mora_matrix = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.dropouts: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._original: Tensor | None = None
        self._active_adapter = adapter_name
        self.training = base_layer.training
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoraConfig) -> None:
        """Add an adapter with a zero matrix; the output does not change."""
        base: Any = self.get_base_layer()
        side = square_side(base.in_features, base.out_features, config.r)
        zeros = torch.zeros(side, side, device=base.weight.device)
        self.mora_matrix[adapter_name] = nn.Parameter(zeros)
        self.r[adapter_name] = config.r
        self.dropouts[adapter_name] = config.dropout
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self._present():
            matrix = self.mora_matrix[name]
            dropped = F.dropout(x, self.dropouts[name], self.training).to(matrix.dtype)
            y = y + update(dropped, matrix, y.shape[-1]).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW, dense, (out, in), fp32: what the update makes of the unit vectors."""
        base: Any = self.get_base_layer()
        matrix = self.mora_matrix[adapter]
        units = torch.eye(base.in_features, device=matrix.device, dtype=matrix.dtype)
        return update(units, matrix, base.out_features).T

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (the active ones without names) to the base's weight, rounding once."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.mora_matrix]
        if not names:
            return
        weight: Any = self.get_base_layer().weight
        if self._original is None:
            self._original = weight.detach().clone()
        self.merged_adapters += names
        total = sum(self.get_delta_weight(name) for name in self.merged_adapters)
        weight.copy_(self._original.float() + total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's bytes back."""
        if self._original is not None:
            weight: Any = self.get_base_layer().weight
            weight.copy_(self._original)
        self._original, self.merged_adapters = None, []

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.mora_matrix]


class MoraModel(BaseTuner):
    """Replaces the targeted linear layers by `MoraLinear`; see `MoraConfig`."""

    prefix = "mora_"
    tuner_layer_cls = MoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = MoraLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
