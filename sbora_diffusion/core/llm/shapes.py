"""Language models without weights: the paper's, from their public configurations, and any other."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.configuration_utils import PretrainedConfig

from sbora_diffusion.core.errors import ConfigError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""Targets of the paper's 16-bit tables; those of its 4-bit table are all of `LINEARS`."""

_FAMILIES: dict[str, tuple[str, ...]] = {
    "falcon": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "bloom": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "gptj": ("q_proj", "k_proj", "v_proj", "fc_in", "fc_out"),
    "opt": ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
    "phi": ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
}
"""Model type → targets, where they are not called as Llama's."""

MODELS: dict[str, dict[str, int]] = {
    "llama-7b": {  # arXiv 2302.13971
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "llama-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "vocab_size": 32000,
    },
    "llama3-8b": {  # arXiv 2407.21783
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""The paper's models by name; the values of their published `config.json`."""


def config_of(model: str) -> PretrainedConfig:
    """The configuration of one of `MODELS`, of a folder or of a hub id.

    Raises:
        ConfigError: there is none.
    """
    if model in MODELS:
        return LlamaConfig(**MODELS[model])  # type: ignore[arg-type]
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model!r} is no language model: {_first_line(error)}",
            f"give a folder, a hub id or one of {', '.join(MODELS)}",
        ) from error


def meta_model(config: PretrainedConfig) -> nn.Module:
    """A model without memory for its weights.

    Raises:
        ConfigError: the configuration is not a causal language model's.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"a {config.model_type!r} model is no causal language model", "give another one"
        ) from error


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The layers that are adapted without a word about it: attention's inputs and the MLP.

    Raises:
        ConfigError: the family is unknown and has none of Llama's names.
    """
    kind = str(getattr(model.config, "model_type", ""))
    targets = _FAMILIES.get(kind, FIVE)
    return targets if kind in _FAMILIES else check_targets(model, targets)


def check_targets(model: Any, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets, each of which names linear layers of the model.

    Raises:
        ConfigError: names the first that does not, and what there is.
    """
    known = linear_names(model)
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"target {target!r} is no linear layer of this {model.config.model_type} model",
                f"it has {', '.join(known)}",
            )
    return targets


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, in the order in which they stand."""
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    named = [n for n in names if head is None or model.get_submodule(n) is not head]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in named))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
