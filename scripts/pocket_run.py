"""What the pocket trainings share: where they run, one optimizer step, a common clock."""

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
