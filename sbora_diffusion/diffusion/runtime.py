"""How a base is run. It decides speed and rounding, and is no part of any recipe."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from sbora_diffusion.core.errors import ConfigError


@dataclass(frozen=True)
class Runtime:
    """What a base's models run with.

    Attributes:
        graphs: record the work of a GPU once and replay it, where that can be (see `graphs`).
        compiled: UNet and text encoder go through `torch.compile`.
        deterministic: a GPU is to add in a fixed order where that is asked for (see
            `deterministic`): in trainings, and in what refines a merge.
        offloaded: models wait in the CPU's memory until they work; those that are trained stay.
            For one training at a time, and for drawing with attached concepts.
    """

    graphs: bool = True
    compiled: bool = False
    deterministic: bool = False
    offloaded: bool = False


USUAL = Runtime()


def checkpoint_gradients(model: Any, on: bool) -> None:
    """Gradient checkpointing of a model of diffusers, or of transformers."""
    if isinstance(model, ModelMixin):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
    elif on:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
        # It may forget its own hook, which could not be copied once the embedding is gone.
        model.disable_input_require_grads()


def compile_in_place(model: nn.Module) -> None:
    """Let a model's calls go through `torch.compile`; parameters and names stay what they are.

    Indices, factors and prompts are inputs of what is compiled: others of the same shape are
    computed by the same code.
    """
    # Without these guards a model would go on without hooks that came after it was compiled.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    model.compile()


def fix_workspaces() -> None:
    """Fix the size of cuBLAS's workspaces in the environment, unless that says one already.

    cuBLAS gets its workspace with a process' first product and keeps it: call this before that one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within, a GPU adds in a fixed order, so that the same work gives the same bits; a CPU does
    anyway.

    PyTorch refuses cuBLAS there unless its workspaces are of a fixed size: `fix_workspaces`.

    Raises:
        ConfigError: the work has a kernel that knows no fixed order.
    """
    if device.type != "cuda":
        yield
        return
    fix_workspaces()
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = False  # nothing here reads such memory
    try:
        yield
    except RuntimeError as error:
        kernel, known, _ = str(error).partition(" does not have a deterministic implementation")
        if not known:
            raise
        raise ConfigError(
            f"{kernel} adds in no fixed order on a GPU",
            "take --device cpu, or train without --deterministic",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]
