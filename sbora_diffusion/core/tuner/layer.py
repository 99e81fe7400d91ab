"""A linear layer with SBoRA adapters beside it."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sbora_diffusion.core.allocation import check_capacity, indices_for
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.functional import SBORA, Variant, branch, delta_weight, join, scaling
from sbora_diffusion.core.merging import Originals, fold, refold
from sbora_diffusion.core.tuner.config import SboraConfig
from sbora_diffusion.core.updates import Update

Gate = Callable[[str, Tensor], Tensor | bool]
"""(adapter, input of the layer (..., in)) → how much of the adapter's update is added: all,
nothing, or a share per token that broadcasts against the layer's output."""


class Form(Protocol):
    """A layer's other form while one adapter trains alone."""

    adapter: str

    def settle(self) -> bool:
        """Bring the weight up to date; whether the form holds now."""

    def output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output where the form holds."""

    def restore(self) -> None:
        """Give the base's bytes back."""


class SboraLinear(nn.Module, BaseTunerLayer):
    """y = base(x) + Σ over the active adapters of scale · ΔW x, or one folded weight.

    While one adapter trains alone, it can live in the weight too (`core.tuner.folded`): the same
    gradients at the cost of the frozen layer.

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
        form: set by `core.tuner.folded`.
        gate: set from outside while updates are confined to some tokens; folded adapters ignore it.

    Raises:
        ConfigError: the base layer is not linear.
        CapacityError: the configuration's range does not fit the layer.
    """

    gate: Gate | None = None
    form: Form | None = None
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
        base = self.linear()
        device = base.weight.device
        shape = [base.out_features, base.in_features]
        dim = 1 if config.variant == "fa" else 0
        indices = _indices(layer_name, shape[dim], config, device)
        shape[dim] = config.r
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        self.sbora_factor[adapter_name] = nn.Parameter(zeros)
        self.sbora_indices[adapter_name] = indices
        self.r[adapter_name] = config.r
        self.configs[adapter_name] = config
        self.weights[adapter_name] = 1.0
        self.layer_scales[adapter_name] = []
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.form is not None and self.form.settle():
            return self.form.output(x, *args, **kwargs)
        live = self._live()
        if self.gate is not None:
            y = self.base_layer(x, *args, **kwargs)
            for name in live:
                y = self._gated(self.gate, name, y, x)
            return y
        parts = []
        for name in live:
            x, part = branch(self._variant(name), x, *self._term(name), self._dropout(name))
            parts.append(part)
        y = self.base_layer(x, *args, **kwargs)
        for name, part in zip(live, parts, strict=True):
            y = join(self._variant(name), y, part, *self._term(name))
        return y

    def _gated(self, gate: Gate, name: str, y: Tensor, x: Tensor) -> Tensor:
        share = gate(name, x)
        if isinstance(share, bool):
            return self._add(name, y, x) if share else y
        return y + share * self._add(name, torch.zeros_like(y), x)

    def _add(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        return SBORA[self._variant(name)](y, x, *self._term(name), self._dropout(name))

    def makeup(self) -> tuple[Any, ...]:
        """What beside tensors decides the output, a gate excepted: the terms after the base's."""
        if self.form is not None and self.form.settle():
            return ()
        return tuple((n, self._variant(n), self.scale(n), self._dropout(n)) for n in self._live())

    def _live(self) -> list[str]:
        """The active adapters that are not folded; folded ones that are disabled are taken out."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [name for name in self._present() if name not in self._folded]

    def _variant(self, name: str) -> Variant:
        return self.configs[name].variant

    def _term(self, name: str) -> tuple[Tensor, Tensor, float]:
        return self.sbora_factor[name], self.sbora_indices[name], self.scale(name)

    def _dropout(self, name: str) -> float:
        return self.configs[name].dropout if self.training else 0.0

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; a form of training gives the weight back meanwhile."""
        super().enable_adapters(enabled)
        if self.form is not None:
            self.form.settle()

    def leave_form(self) -> None:
        """Give the base's bytes back, if a form of training holds the weight."""
        if self.form is not None:
            self.form.restore()
            self.form = None

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
        self.leave_form()
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
        if self.form is not None and self.form.adapter == adapter_name:
            self.leave_form()
        if adapter_name in self._folded:
            self._fold({n: u for n, u in self._folded.items() if n != adapter_name})
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters folded into it or with its own bytes."""
        self.leave_form()
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.get_base_layer()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW, dense, (out, in), fp32."""
        config, base = self.configs[adapter], self.linear()
        factor, indices = self.sbora_factor[adapter], self.sbora_indices[adapter]
        shape = (base.out_features, base.in_features)
        return delta_weight(config.variant, factor, indices, shape, self.scale(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is additive and has rank r."""
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {c.variant} r={c.r}" for n, c in self.configs.items())

    def linear(self) -> nn.Linear:
        """The layer that all adapters stand around."""
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
        weight, values = self.linear().weight, list(updates.values())
        if self._originals is None:
            originals = fold(weight, values)
        else:
            originals = refold(weight, self._originals, values)
        self._originals = originals if updates else None
        self._folded = updates


def _indices(layer_name: str, width: int, config: SboraConfig, device: torch.device) -> Tensor:
    """The adapter's indices in one layer; a model without weights, which is only counted, gets
    none drawn."""
    if device.type == "meta":
        check_capacity({layer_name: width}, *config.index_range)
        return torch.empty(config.r, dtype=torch.int32, device=device)
    return indices_for(layer_name, width, *config.index_range, config.allocation_seed).to(device)


def _check_linear(base: nn.Module, layer_name: str) -> None:
    # nn.MultiheadAttention reads its out_proj's weight without calling it: an adapter there would
    # be silently without effect.
    silent = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if silent or not isinstance(base, nn.Linear):
        raise ConfigError(
            f"SBoRA adapts nn.Linear, {layer_name!r} is a {type(base).__name__}",
            "leave it out of target_modules",
        )
