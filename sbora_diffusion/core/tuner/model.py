"""SBoRA injected into a model by PEFT."""

import warnings
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from sbora_diffusion.core.tuner.config import SboraConfig
from sbora_diffusion.core.tuner.layer import SboraLinear


class SboraModel(BaseTuner):
    """Replaces the targeted linear layers by `SboraLinear`; see `SboraConfig`."""

    prefix = "sbora_"
    tuner_layer_cls = SboraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SboraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer_name = peft_config.name_prefix + current_key.removeprefix("_orig_mod.")
        if isinstance(target, SboraLinear):
            target.update_layer(adapter_name, peft_config, layer_name)
            return
        layer = SboraLinear(target, adapter_name, peft_config, layer_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Layers are made on the base's device. PEFT's own version also assigns the weight anew,
        # which fails for an embedding with trained token rows.
        setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            if other is not config and isinstance(other, SboraConfig) and _share(config, other):
                warnings.warn(
                    f"The new adapter and {name!r} own the same indices. Give each its own slot to "
                    "keep them disjoint.",
                    stacklevel=2,
                )


def _share(a: Any, b: SboraConfig) -> bool:
    """Whether two adapters are drawn from one permutation with ranges that meet."""
    same = (a.variant, a.allocation_seed) == (b.variant, b.allocation_seed)
    (a_start, a_stop), (b_start, b_stop) = a.index_range, b.index_range
    return same and a_start < b_stop and b_start < a_stop
