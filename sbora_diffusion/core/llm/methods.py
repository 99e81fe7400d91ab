"""One table of methods: SBoRA, MoRA and every tuner that PEFT has, by `--method`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from sbora_diffusion.core.errors import ConfigError, SboraError
from sbora_diffusion.core.settings import nearest
from sbora_diffusion.core.tuner import MoraConfig, SboraConfig

TASK = "CAUSAL_LM"
OURS = ("sbora-fa", "sbora-fb", "mora")
VIRTUAL_TOKENS = 20

_OWN_TARGETS = ("adaption-prompt", "beft", "ia3", "ln-tuning", "shadow", "trainable-tokens")
"""Methods that choose their layers themselves."""
_REFUSED = {
    "cpt": "token ids of a context, and their types in the data",
    "multitask-prompt-tuning": "the number of a task in each example",
    "poly": "the number of a task in each example",
    "xlora": "adapters that are trained already",
}
"""Methods whose needs no data set here meets."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is put into a model.

    Attributes:
        method: one of `method_names()`.
        alpha: scale = alpha / rank where the method has one.
        slot, allocation_seed: SBoRA's indices, see `SboraConfig`.
        options: further fields of the method's own configuration in PEFT.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    slot: int = 0
    allocation_seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def method_names() -> list[str]:
    """All methods: ours, LoRA's kin, then PEFT's tuners by their own names."""
    named = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    others = sorted(name.replace("_", "-") for name in named - {"lora", "sbora", "mora"})
    return [*OURS, "lora", "dora", "rslora", *others]


def adapter_config(adapter: Adapter) -> PeftConfig:
    """The PEFT configuration of an adapter.

    Raises:
        ConfigError: an unknown method or option, or a value that the method refuses.
    """
    values, kind = _values(adapter)
    known = {field.name for field in dataclasses.fields(kind)}
    for key in adapter.options:
        if key not in known:
            raise ConfigError(
                f"method {adapter.method!r} has no option {key!r}", nearest(key, sorted(known))
            )
    return _made(adapter.method, lambda: kind(**{**values, **adapter.options}))


def adapted(model: Any, adapter: Adapter) -> PeftModel:
    """The model with a new adapter in it, named "default"; only the adapter trains.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    if adapter.method == "adaption-prompt":  # LLaMA-Adapter: a prompt in each layer
        layers = model.config.num_hidden_layers
        chosen = {"adapter_len": VIRTUAL_TOKENS, "adapter_layers": layers, **adapter.options}
        adapter = dataclasses.replace(adapter, options=chosen)
    config = adapter_config(adapter)
    return _made(adapter.method, lambda: get_peft_model(model, config))  # type: ignore[arg-type]


def trained_parameters(model: nn.Module) -> int:
    """How many numbers an optimizer would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _values(adapter: Adapter) -> tuple[dict[str, Any], type[PeftConfig]]:
    method, targets = adapter.method, list(adapter.targets)
    if method in ("sbora-fa", "sbora-fb"):
        return {
            "r": adapter.rank,
            "alpha": adapter.alpha,
            "variant": method[-2:],
            "dropout": adapter.dropout,
            "target_modules": targets,
            "allocation_seed": adapter.allocation_seed,
            "slot": adapter.slot,
            "task_type": TASK,
        }, SboraConfig
    if method == "mora":
        return _fitting(MoraConfig, adapter), MoraConfig
    if method in ("lora", "dora", "rslora"):
        values = _fitting(LoraConfig, adapter)
        return values | {"use_dora": method == "dora", "use_rslora": method == "rslora"}, LoraConfig
    return _values_of_peft(adapter)


def _values_of_peft(adapter: Adapter) -> tuple[dict[str, Any], type[PeftConfig]]:
    kinds = {str(getattr(k, "value", k)).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = adapter.method
    kind = kinds.get(method.replace("-", "_"))
    if kind is None:
        raise ConfigError(
            f"unknown method {method!r}", nearest(method, method_names(), what="methods")
        )
    if method in _REFUSED:
        raise ConfigError(
            f"method {method!r} needs {_REFUSED[method]}", "train it with PEFT itself"
        )
    values = _fitting(kind, adapter)
    if method in _OWN_TARGETS:
        del values["target_modules"]
    if method == "oft":  # its block size follows from the rank
        values["oft_block_size"] = 0
    return values, kind


def _fitting(kind: type[PeftConfig], adapter: Adapter) -> dict[str, Any]:
    """The adapter's values under the names that a configuration has for them."""
    known = {field.name for field in dataclasses.fields(kind)}
    named = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "dropout": adapter.dropout,
        "target_modules": list(adapter.targets),
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "task_type": TASK,
    }
    return {key: value for key, value in named.items() if key in known}


def _made(method: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; PEFT's refusals become one line."""
    try:
        return make()
    except SboraError:
        raise
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(
            f"method {method!r} needs a package that is missing: {reason}", "install it"
        ) from error
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(
            f"method {method!r} cannot be put into this model: {reason}",
            "give what it needs under method_options, or choose another method",
        ) from error
