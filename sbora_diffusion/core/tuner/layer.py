"""A linear layer with SBoRA adapters beside it."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sbora_diffusion.core.allocation import indices_for
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.functional import SBORA, delta_weight, scaling
from sbora_diffusion.core.merging import Originals, fold, refold
from sbora_diffusion.core.tuner.config import SboraConfig
from sbora_diffusion.core.updates import Update

Gate = Callable[[str, Tensor], Tensor | bool]
"""(adapter, input of the layer (..., in)) → how much of the adapter's update is added: all,
nothing, or a share per token that broadcasts against the layer's output."""


class SboraLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + Σ over the active adapters of scale · ΔW x, or one folded weight.

    Adapters only add to the base layer's output, so a quantized base works too. The factor is kept
    in fp32 whatever the base's dtype: folding then rounds once. Folding several adapters gives the
    same bytes in any order, and every way out of a folded state restores the stored originals.

    Args:
        base_layer: an `nn.Linear` (bitsandbytes' subclasses included), or another tuner's layer
            around one.
        adapter_name: name of the first adapter.
        config: its configuration.
        layer_name: canonical name, from which the indices are drawn.

    Attributes:
        gate: set from outside while updates are confined to some tokens; folded adapters ignore it.

    Raises:
        ConfigError: the base layer is not linear.
        CapacityError: the configuration's range does not fit the layer.
    """

    gate: Gate | None = None
    adapter_layer_names = ("sbora_factor",)
    other_param_names = ("sbora_indices", "r", "configs", "weights", "layer_scales")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SboraConfig, layer_name: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        _check_linear(self.get_base_layer(), layer_name)
        self.sbora_factor = nn.ParameterDict()
        self.sbora_indices = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.configs: dict[str, SboraConfig] = {}
        self.weights: dict[str, float] = {}
        self.layer_scales: dict[str, list[float]] = {}
        self._folded: dict[str, Update] = {}
        self._originals: Originals | None = None
        self._active_adapter = adapter_name
        self.training = base_layer.training
        self.update_layer(adapter_name, config, layer_name)

    def update_layer(self, adapter_name: str, config: SboraConfig, layer_name: str) -> None:
        """Add an adapter with a zero factor; the output does not change."""
        base = self._linear()
        device = base.weight.device
        shape = [base.out_features, base.in_features]
        dim = 1 if config.variant == "fa" else 0
        indices = indices_for(layer_name, shape[dim], *config.index_range, config.allocation_seed)
        shape[dim] = config.r
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        self.sbora_factor[adapter_name] = nn.Parameter(zeros)
        self.sbora_indices[adapter_name] = indices.to(device)
        self.r[adapter_name] = config.r
        self.configs[adapter_name] = config
        self.weights[adapter_name] = 1.0
        self.layer_scales[adapter_name] = []
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.configs and name not in self._folded:
                y = self._add(name, y, x) if self.gate is None else self._gated(name, y, x)
        return y

    def _gated(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        assert self.gate is not None
        share = self.gate(name, x)
        if isinstance(share, bool):
            return self._add(name, y, x) if share else y
        return y + share * self._add(name, torch.zeros_like(y), x)

    def _add(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        config = self.configs[name]
        factor, indices = self.sbora_factor[name], self.sbora_indices[name]
        dropout = config.dropout if self.training else 0.0
        return SBORA[config.variant](y, x, factor, indices, self.scale(name), dropout)

    def scale(self, adapter: str) -> float:
        """weight · alpha / r with everything that `set_scale` and `scale_layer` asked for."""
        config = self.configs[adapter]
        assert config.alpha is not None
        weight = math.prod(self.layer_scales[adapter], start=self.weights[adapter])
        return scaling(config.alpha, config.r, weight)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the weight λ of one adapter; unknown adapters belong to other layers."""
        if adapter not in self.weights:
            return
        # diffusers undoes `scale_layer(0)` by set_scale(1): that must not lose the weight.
        if 0.0 in self.layer_scales[adapter]:
            self.layer_scales[adapter].clear()
            scale = self.weights[adapter] if scale == 1.0 else scale
        self.weights[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scale until `unscale_layer`; factors are kept, so that
        undoing is exact."""
        for name in self._present():
            self.layer_scales[name].append(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a value, forget all scales and weights."""
        for name in self._present():
            if scale is None:
                self.layer_scales[name].clear()
                self.weights[name] = 1.0
            elif scale in self.layer_scales[name]:
                self.layer_scales[name].remove(scale)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the folded adapters."""
        return list(self._folded)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (the active ones without names) beside those already folded.

        Args:
            safe_merge: without effect: a fold is always checked before anything is written.

        Raises:
            NonFiniteError: names the adapter; the weight is unchanged.
            FormatError: the base is quantized; fold into its unquantized original.
        """
        names = check_adapters_to_merge(self, adapter_names)
        new = {name: self._update(name) for name in names if name in self.configs}
        if new:
            self._fold({**self._folded, **new})

    def unmerge(self) -> None:
        """Put the base's bytes back."""
        for scales in self.layer_scales.values():
            scales.clear()  # diffusers' fuse_lora(lora_scale) never takes its scale back
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._fold({})

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it is folded, the others are folded again without it."""
        if adapter_name in self._folded:
            self._fold({n: u for n, u in self._folded.items() if n != adapter_name})
        super().delete_adapter(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW, dense, (out, in), fp32."""
        config, base = self.configs[adapter], self._linear()
        factor, indices = self.sbora_factor[adapter], self.sbora_indices[adapter]
        shape = (base.out_features, base.in_features)
        return delta_weight(config.variant, factor, indices, shape, self.scale(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive and has rank r."""
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {c.variant} r={c.r}" for n, c in self.configs.items())

    def _linear(self) -> nn.Linear:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.configs]

    def _update(self, name: str) -> Update:
        config = self.configs[name]
        factor = self.sbora_factor[name].detach().clone()
        key = config.merge_key or name
        return Update(key, config.variant, self.sbora_indices[name], factor, self.scale(name))

    def _fold(self, updates: dict[str, Update]) -> None:
        weight, values = self._linear().weight, list(updates.values())
        if self._originals is None:
            originals = fold(weight, values)
        else:
            originals = refold(weight, self._originals, values)
        self._originals = originals if updates else None
        self._folded = updates


def _check_linear(base: nn.Module, layer_name: str) -> None:
    # nn.MultiheadAttention reads its out_proj's weight without calling it: an adapter there would
    # be silently without effect.
    silent = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if silent or not isinstance(base, nn.Linear):
        raise ConfigError(
            f"SBoRA adapts nn.Linear, {layer_name!r} is a {type(base).__name__}",
            "leave it out of target_modules",
        )
