"""How a base is run. It decides speed and rounding, and is no part of any recipe."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Runtime:
    """What a base's models run with.

    Attributes:
        graphs: record the work of a GPU once and replay it, where that can be (see `graphs`).
        compiled: UNet and text encoder go through `torch.compile`.
    """

    graphs: bool = True
    compiled: bool = False


USUAL = Runtime()


def compile_in_place(model: nn.Module) -> None:
    """Let a model's calls go through `torch.compile`; parameters and names stay what they are.

    Indices, factors and prompts are inputs of what is compiled: others of the same shape are
    computed by the same code.
    """
    # Without these guards a model would go on without hooks that came after it was compiled.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    model.compile()
