"""What NF4 weights hold: their values in 16 bits, and what merging into NF4 would lose."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed by bitsandbytes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantized_weight(layer: Any) -> Tensor:
    """The weight (out, in) that an NF4 layer multiplies with, in the dtype that was quantized."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@torch.no_grad()
def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """A plain model with the values of an NF4 one.

    They are values of the dtype that was quantized, so that it and fp32 hold them exactly.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).to(model.device)
    plain.generation_config = model.generation_config
    values = {
        name: value for name, value in model.state_dict().items() if name in plain.state_dict()
    }
    for name, layer in _quantized(model):
        values[f"{name}.weight"] = dequantized_weight(layer)
    plain.load_state_dict(values)
    return plain.eval()


def quantized_again(layer: Any, weight: Tensor) -> None:
    """Put a weight (out, in) into an NF4 layer, quantized as the layer's own was."""
    from bitsandbytes.functional import quantize_4bit

    state = layer.weight.quant_state
    packed, layer.weight.quant_state = quantize_4bit(
        weight.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.weight.dtype,
    )
    layer.weight.data = packed.view(layer.weight.data.shape)


def _quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every NF4 layer by its name."""
    for name, layer in model.named_modules():
        if is_quantized(layer):
            yield name, layer


class Overlaid(nn.Module):
    """An NF4 layer whose owned columns or rows are replaced by others in 16 bits, exactly.

    y = NF4(x) with the owned part of W taken out and its merged values put in. Columns: the inputs
    I are hidden from the NF4 weight and multiplied with `columns` (out, n) instead. Rows: the
    outputs I are overwritten by x `rows` (n, in)^T.
    """

    def __init__(self, base: nn.Module, dim: int, at: Tensor, block: Tensor) -> None:
        super().__init__()
        self.base: Any = base
        self.dim = dim
        self.at: Tensor
        self.block: Tensor
        self.register_buffer("at", at)
        self.register_buffer("block", block)

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block.to(x.dtype)
        if self.dim == 1:
            y = self.base(x.index_fill(-1, self.at, 0.0))
            return y + x.index_select(-1, self.at) @ block.T
        rows = x @ block.T
        if self.base.bias is not None:
            rows = rows + self.base.bias.index_select(0, self.at).to(x.dtype)
        return self.base(x).index_copy(-1, self.at, rows)

    def weight_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight (out, in) that the layer stands for."""
        whole = dequantized_weight(self.base).to(dtype)
        return whole.index_copy(self.dim, self.at, self.block.to(dtype))
