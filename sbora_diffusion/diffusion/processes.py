"""One training in several processes: each computes with its rows of a batch, and accelerate
averages the gradients. A process alone does nothing of this.

All processes draw the whole batch, so that their states are the same, and the concept is the one
that a process alone trains, up to rounding.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.state import Batch


def own_rows(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's rows, weighted so that the mean of the processes' losses is the loss of the
    whole, whether or not all have as many."""
    total, count = len(batch.ids), accelerator.num_processes
    own = Batch(*(part[accelerator.process_index :: count] for part in batch))
    return own._replace(weight=own.weight * (len(own.ids) * count / total))


@torch.no_grad()
def shared(losses: Tensor, parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> Tensor:
    """The mean of the processes' losses; where a step is due, of their gradients too, in one
    message: they are small."""
    grads = [p.grad for p in parameters if p.grad is not None and accelerator.sync_gradients]
    parts = [losses, *grads]
    flat = torch.cat([part.flatten() for part in parts])
    means = accelerator.reduce(flat, "mean").split([part.numel() for part in parts])
    if grads:
        torch._foreach_copy_(grads, [m.view_as(g) for m, g in zip(means[1:], grads, strict=True)])
    return means[0]


def accelerator_for(base: Base, precision: str, accumulated: int = 1) -> Accelerator:
    """Accelerate keeps one precision for the whole process: a training must not be bound to that
    of the one before.

    Args:
        precision: "no", "fp16" or "bf16", of autocast.
        accumulated: passes whose gradients one step takes together.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulated,
        device_placement=False,  # the base may lie on another GPU than the first
        cpu=base.device.type == "cpu",
    )


def refuse_apart(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raise ConfigError if several processes cannot train this together."""
    if accelerator.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"{accelerator.distributed_type.value} divides the weights in which concepts live",
            "launch data-parallel: scripts/accelerate/two_gpus.yaml",
        )
    if config.dropout > 0.0:
        raise ConfigError(
            "dropout draws differently in several processes", "train in one, or without dropout"
        )
    if config.batch_size < accelerator.num_processes:
        raise ConfigError(
            f"a batch of {config.batch_size} for {accelerator.num_processes} processes",
            "raise batch_size, which counts the pictures of all of them",
        )
