"""Base models and tokenizers from folders or the hub, in full precision, 16 bits or NF4."""

from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sbora_diffusion.core.errors import ConfigError

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
        device: where it lies; without one the CPU, under NF4 this process's device.

    Raises:
        ConfigError: there is no such model, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "use_safetensors": True,  # else a folder's .bin files would be unpickled
    }
    if quantize == "nf4":
        options["quantization_config"] = _nf4(dtype, double_quant)
        options["device_map"] = {"": device or own_device()}
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


def own_device() -> str:
    """The GPU of this process, of all that `accelerate launch` started; the CPU without any."""
    return str(PartialState().device)


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


def _nf4(dtype: str, double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=DTYPES[dtype],
        bnb_4bit_quant_storage=DTYPES[dtype],  # FSDP divides no integers
    )


def _not_a_model(reference: str, error: BaseException) -> ConfigError:
    reason = str(error).strip().partition("\n")[0][:200]
    return ConfigError(
        f"{reference!r} holds no language model: {reason}", "give a folder or a hub id"
    )
