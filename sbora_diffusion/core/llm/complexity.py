"""The paper's Tables 1 and 2, corrected, and held against the layers that run here.

Both tables are about one linear layer of `out` outputs and `inp` inputs at rank r. The paper calls
them d and k in Table 1, k and d in Table 2; here they have their own names. What is corrected:
"Total Params" of Table 1 has the two variants swapped.

Not in the tables: the factor scale = alpha / r, which takes one more multiplication for each of the
r or out numbers where it is not 1 and is not folded into the factor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sbora_diffusion.core.llm.methods import trained_parameters
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear

OUT, INP, R = sympy.symbols("out inp r")


@dataclass(frozen=True)
class Cost:
    """What one layer costs, in `out`, `inp` and `r`.

    Attributes:
        trained: parameters with a gradient.
        stored: numbers in a file: trained ones, and r integers for a one-hot factor.
        printed: `stored` as Table 1 has it.
        multiplications, additions: of one token's forward pass, base included.
    """

    method: str
    trained: sympy.Expr
    stored: sympy.Expr
    printed: sympy.Expr
    multiplications: sympy.Expr
    additions: sympy.Expr


def value(formula: sympy.Expr, out: int, inp: int, r: int) -> int:
    """A formula with numbers in it."""
    return int(formula.subs({OUT: out, INP: inp, R: r}))


_BASE, _SUMS = OUT * INP, OUT * (INP - 1)
TABLE = (
    Cost(
        "LoRA", (INP + OUT) * R, (INP + OUT) * R, (INP + OUT) * R,
        _BASE + (INP + OUT) * R, _SUMS + R * (INP - 1) + OUT * (R - 1) + OUT,
    ),
    Cost(
        "SBoRA-FA", OUT * R, R + OUT * R, R + INP * R,
        _BASE + OUT * R, _SUMS + OUT * (R - 1) + OUT,
    ),
    Cost(
        "SBoRA-FB", INP * R, R + INP * R, R + OUT * R,
        _BASE + INP * R, _SUMS + R * (INP - 1) + R,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a layer shows when it is built and run.

    Attributes:
        multiplications: half of the counted floating-point operations of its matrix products.
    """

    trained: int
    stored: int
    multiplications: int


def measure(method: str, out: int, inp: int, r: int) -> Measured:
    """Build a layer, count its tensors, and count the operations of one token's forward pass."""
    layer = _LAYERS[method](nn.Linear(inp, out, bias=False), r)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, inp))
    own = [t for n, t in layer.state_dict().items() if "base_layer" not in n]
    stored = sum(tensor.numel() for tensor in own)
    return Measured(trained_parameters(layer), stored, counter.get_total_flops() // 2)


def _sbora(variant: str) -> Callable[[nn.Linear, int], nn.Module]:
    def layer(base: nn.Linear, r: int) -> nn.Module:
        base.requires_grad_(False)
        config = SboraConfig(r=r, variant=variant)  # type: ignore[arg-type]
        return SboraLinear(base, "default", config, "layer")

    return layer


def _lora(base: nn.Linear, r: int) -> nn.Module:
    base.requires_grad_(False)
    return LoraLinear(base, "default", config=LoraConfig(), r=r, lora_alpha=r)


_LAYERS = {"LoRA": _lora, "SBoRA-FA": _sbora("fa"), "SBoRA-FB": _sbora("fb")}
