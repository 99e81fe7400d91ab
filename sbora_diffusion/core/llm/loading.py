"""Base models and tokenizers from folders or the hub, in full precision, 16 bits or NF4."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sbora_diffusion.core.errors import BaseMismatch, ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(
    reference: str,
    dtype: str = "fp32",
    quantize: str = "none",
    double_quant: bool = False,
    device: str | None = None,
) -> Any:
    """A causal language model, in evaluation mode.

    Args:
        reference: a folder or a hub id.
        dtype: of the weights; under NF4 of the products.
        quantize: "none" or "nf4" (bitsandbytes; QLoRA, arXiv 2305.14314).
        device: where it lies; the CPU without one, and under NF4 where it is quantized.

    Raises:
        ConfigError: there is no such model, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantize == "nf4":
        options["quantization_config"] = _nf4(dtype, double_quant)
        options["device_map"] = {"": device or "cpu"}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(reference, **options)
    except ImportError as error:
        raise ConfigError(
            f"NF4 needs bitsandbytes: {error}", "pip install 'sbora-diffusion[opt]'"
        ) from error
    except (OSError, ValueError) as error:
        raise _not_a_model(reference, error) from error
    make_quantized_trainable(model)
    if device and quantize == "none":
        model.to(device)
    model.config.use_cache = False  # with a cache, packed examples would see each other
    return model.eval()


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise _not_a_model(reference, error) from error


def make_quantized_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights in an evaluation pass on a CPU.

    On processors with AVX512-BF16 the first forward pass in evaluation mode stores the weights in
    another layout, and gradients of later training are wrong. Layers whose inputs are no multiple
    of 64 fail in that layout.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_fits(adapter: Path, model: nn.Module) -> None:
    """Refuse an adapter whose layers the model does not have, or has in other sizes.

    Raises:
        ConfigError: the folder holds no adapter.
        BaseMismatch: names the first layer that does not fit.
    """
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError(f"{adapter} holds no adapter", "give what `sbora llm train` wrote")
    modules = dict(model.named_modules())
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            layer = _layer_of(key)
            if layer is None:
                continue
            sizes = tuple(tensors.get_slice(key).get_shape())
            if layer not in modules or not _has_sizes(modules[layer], key, sizes):
                raise BaseMismatch(
                    f"{adapter} was trained on another model: {layer} does not fit {sizes}",
                    "give the base that it was trained on",
                )


def _layer_of(key: str) -> str | None:
    """The adapted layer of a factor's key; None for what is no factor of a linear layer."""
    name = key.removeprefix("base_model.model.")
    for part in (".sbora_factor", ".lora_A", ".lora_B"):
        if part in name:
            return name.partition(part)[0]
    return None


def _has_sizes(module: nn.Module, key: str, sizes: tuple[int, ...]) -> bool:
    inputs, outputs = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    if "lora_A" in key:
        return sizes[-1] == inputs
    if "lora_B" in key:
        return sizes[0] == outputs
    return sizes[0] == outputs or sizes[-1] == inputs


def _nf4(dtype: str, double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


def _not_a_model(reference: str, error: BaseException) -> ConfigError:
    reason = str(error).strip().partition("\n")[0][:200]
    return ConfigError(
        f"{reference!r} holds no language model: {reason}", "give a folder or a hub id"
    )
