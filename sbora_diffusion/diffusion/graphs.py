"""CUDA graphs: a GPU's work that is recorded once for each shape of its inputs, then replayed.

A small model's kernels take less time than their launches, which a replay does without. What was
recorded reads weights, indices and factors where they lie, so it follows every change in place.
"""

import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbora_diffusion.core.strips import on_device

CAPABLE = ("cuda",)
"""Kinds of devices that have graphs."""
WARM_UP = 3
"""Calls before the recording, in which libraries allocate what they keep."""


class Obstacle(StrEnum):
    """Why work is launched kernel by kernel."""

    OFF = "graphs are switched off"
    NOT_CUDA = "the device has no CUDA graphs"
    FAILED = "recording failed: the work waits for the device, or memory is short"
    DROPOUT = "dropout draws in the recipe"
    CHECKPOINTING = "gradient checkpointing reads the state of the random generator"
    LOSS_SCALE = "fp16 scales the loss by what earlier steps gave"
    HOOKED = "layers have hooks"
    GATED = "a gate confines updates to some tokens"
    FOREIGN = "adapters of another kind are attached"
    ATTENTION = "an attention processor is none of diffusers' own"


def device_obstacle(device: torch.device, wanted: bool) -> Obstacle | None:
    """Why nothing is recorded on a device, whatever the work; None where that can be."""
    if not wanted:
        return Obstacle.OFF
    return None if device.type in CAPABLE else Obstacle.NOT_CUDA


class Memory:
    """Where recordings work. They are replayed one at a time and leave nothing but their results,
    which are copied, so that several can share it."""

    @cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


class Recording(NamedTuple):
    """A recorded call: where its inputs are read from, and where its result is left."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    output: Tensor

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given, non_blocking=True)
        self.replay()
        return self.output.clone()


class Recorded:
    """A function of tensors that is recorded once for each shape of them, where it can be.

    The function must not wait for the device nor decide anything by values. Without an obstacle,
    calls do not wait for the device either.

    Args:
        function: tensors on the device → a tensor.
        device: inputs may lie elsewhere.
        obstacle: why nothing may be recorded.
        adds_to: tensors that the function adds to beside its result, such as gradients; they must
            exist, and stay where they are.
        memory: where recordings work, its own by default.

    Attributes:
        obstacle: set if a recording fails; the function is called as it is from then on.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        obstacle: Obstacle | None = None,
        adds_to: Sequence[Tensor] = (),
        memory: Memory | None = None,
    ) -> None:
        self.obstacle = obstacle
        self._function, self._device, self._adds_to = function, device, list(adds_to)
        self._memory = memory or Memory()
        self._recordings: dict[Any, Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if self.obstacle is None and shapes not in self._recordings:
            self._record(shapes, inputs)
        if self.obstacle is not None:
            return self._function(*(tensor.to(self._device) for tensor in inputs))
        return self._recordings[shapes].call(inputs)

    def _record(self, shapes: Any, inputs: Sequence[Tensor]) -> None:
        places = [tensor.to(self._device, copy=True) for tensor in inputs]
        before = [tensor.clone() for tensor in self._adds_to]
        try:
            with on_device(self._device):
                replay, output = capture(partial(self._function, *places), self._memory)
            self._recordings[shapes] = Recording(places, replay, output)
        except RuntimeError as error:
            self.obstacle = Obstacle.FAILED
            self._recordings.clear()
            warnings.warn(f"{Obstacle.FAILED} ({error})", stacklevel=3)
        finally:  # warming up has added to them
            for tensor, value in zip(self._adds_to, before, strict=True):
                tensor.copy_(value)


def adding_at_once(
    work: Callable[..., Tensor], parameters: Sequence[nn.Parameter], *inputs: Tensor
) -> Tensor:
    """Work with a backward pass, whose gradients are added to those that stand there in a few
    kernels for all parameters; autograd alone would take one for each."""
    standing = [(p, p.grad) for p in parameters if p.grad is not None]
    for parameter, _ in standing:
        parameter.grad = None
    try:
        result = work(*inputs)
        new = [(total, p.grad) for p, total in standing if p.grad is not None]
        if new:
            torch._foreach_add_([total for total, _ in new], [grad for _, grad in new])
    finally:
        for parameter, total in standing:
            parameter.grad = total
    return result


def capture(work: Callable[[], Tensor], memory: Memory) -> tuple[Callable[[], object], Tensor]:
    """Record work as a CUDA graph: what repeats it, and where its result then lies.

    Raises:
        RuntimeError: the work waits for the device, or memory is short.
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory.pool):
        output = work()
    return graph.replay, output
