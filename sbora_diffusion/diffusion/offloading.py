"""Models that wait in the CPU's memory and come to the GPU for their work alone, by accelerate's
hooks: those that diffusers' `enable_model_cpu_offload` sets, but for models that must stay.

That function moves all models after each picture. What is trained cannot move: the optimizer,
recordings and folded weights know its tensors by their places.
"""

from collections.abc import Collection
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from torch import nn


class Offloading:
    """Which of a pipeline's models wait.

    Args:
        pipeline: of diffusers; its models may lie anywhere.
        device: where they work.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.device = device
        self._pipeline = pipeline
        self._hooks: list[UserCpuOffloadHook] = []
        self.keep(())

    def keep(self, staying: Collection[str]) -> None:
        """Let these models stay on the device, and all others wait until they are needed.

        Args:
            staying: names of the pipeline's components.
        """
        self._pipeline.remove_all_hooks()
        self._hooks, previous = [], None
        for name in self._pipeline.model_cpu_offload_seq.split("->"):
            model = getattr(self._pipeline, name, None)
            if not isinstance(model, nn.Module):
                continue
            if name in staying:
                model.to(self.device)
            else:
                _, previous = cpu_offload_with_hook(model, self.device, previous)
                self._hooks.append(previous)

    def rest(self) -> None:
        """Send back what has done its work."""
        for hook in self._hooks:
            hook.offload()
