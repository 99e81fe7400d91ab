"""What the pocket trainings share: where they run, one optimizer step, a common clock, a state to
go on from."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sbora_diffusion.core.checkpoints import CheckpointFolder, Content
from sbora_diffusion.diffusion.optimizers import OptimizerState, put_back, settings_of, state_of


@dataclass(frozen=True)
class Place:
    """Where this process computes: rank of how many, device, and whether it may compile."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def find(cls) -> "Place":
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            return cls(rank, world, torch.device("cpu"))
        if world > 1:
            dist.init_process_group("nccl")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return cls(rank, world, torch.device("cuda", torch.cuda.current_device()))

    def wrap(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device, memory_format=torch.channels_last)
        compiled = torch.compile(module) if self.device.type == "cuda" else module
        return DistributedDataParallel(compiled) if self.world > 1 else compiled

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def shared(place: Place, value: float) -> float:
    """Rank 0's clock decides for all, so that every process stops at the same step."""
    if place.world == 1:
        return value
    clock = torch.tensor(value, device=place.device)
    dist.broadcast(clock, 0)
    return clock.item()


def save_state(
    folder: Path,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    numbers: Mapping[str, float],
) -> None:
    """Write a checkpoint: models by name, an optimizer, and numbers by name."""
    states = {name: model.state_dict() for name, model in models.items()}
    points = {
        name: {key: value.item() for key, value in state.items() if value.dim() == 0}
        for name, state in states.items()
    }
    tensors = {
        name: {key: value for key, value in state.items() if value.dim() > 0}
        for name, state in states.items()
    }
    document: dict[str, Any] = {"numbers": dict(numbers), "points": points}
    if optimizer:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = state_of(optimizer, parameters, settings_of(optimizer))
        tensors["optimizer"], document["optimizer"] = known.tensors, known.document
    CheckpointFolder(folder).write(int(numbers.get("steps", 0)), Content(document, tensors))


def resume(
    folder: Path,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, float] | None:
    """Go on from the newest checkpoint: its numbers; None where there is none."""
    content = CheckpointFolder(folder).newest(print)
    if content is None:
        return None
    for name, model in models.items():
        points = {k: torch.tensor(v) for k, v in content.document["points"][name].items()}
        model.load_state_dict({**content.tensors[name], **points})
    if optimizer:
        saved = OptimizerState(content.tensors["optimizer"], content.document["optimizer"])
        put_back(optimizer, saved)
    return content.document["numbers"]
