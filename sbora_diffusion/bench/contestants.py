"""One method on one model, run in one way: what takes turns."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sbora_diffusion.bench.methods import METHODS, Adapter, Site, attach
from sbora_diffusion.bench.settings import Mode

GRAPH_WARM_UP = 3


class Contestant:
    """A training step: forward pass, backward pass, AdamW, and what the method does after it.

    Args:
        model: with the adapter in place.
        mode: "eager"; "compiled", the model by torch.compile; "graphs", the whole step as one CUDA
            graph.

    Attributes:
        inputs: set before the first step; those of floating point get gradients.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, mode: Mode = "eager") -> None:
        self.model, self.adapter, self.mode = model, adapter, mode
        self.inputs: Sequence[Tensor] = ()
        self._call: Callable[..., Tensor] = model
        self._gradient: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        if mode == "compiled":
            self._call = torch.compile(model, dynamic=False)

    def set_inputs(self, inputs: Sequence[Tensor], pool: Any = None) -> None:
        """Take another batch; a graph is captured anew.

        Args:
            pool: memory pool that graphs share.
        """
        self.inputs, self._gradient, self._replay = inputs, None, None
        if self.mode == "graphs":
            self._replay = captured(self._step, pool)

    def step(self) -> None:
        """One training step."""
        (self._replay or self._step)()

    def passes(self) -> None:
        """Forward and backward pass."""
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        output = self._call(*leaves)
        if self._gradient is None:
            self._gradient = torch.full_like(output, 1 / output.numel())
        output.backward(self._gradient)

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.adapter.parameters.values():
            parameter.grad = None

    def _step(self) -> None:
        self.passes()
        if self.adapter.optimizer is not None:
            self.adapter.optimizer.step()
            self.forget()
        if self.adapter.after is not None:
            self.adapter.after()


def contestant(
    base: nn.Module, method: str, site: Callable[[nn.Module], Site], mode: Mode = "eager"
) -> Contestant:
    """A method on a twin of the base; what it draws at random is the same each time."""
    model = twin(base)
    place = site(model)
    if METHODS[method].writes_weights:
        for name in place.layers:
            layer: Any = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = attach(method, place)
    return Contestant(model, adapter, mode)


def twin(base: nn.Module) -> nn.Module:
    """A copy of the modules that shares their parameters and buffers."""
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def sizes(adapter: Adapter) -> dict[str, int]:
    """Trained parameters, and bytes of AdamW's state and of the file; after a step."""
    optimizer = adapter.optimizer
    states = optimizer.state.values() if optimizer is not None else ()
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    file = {name: value.contiguous() for name, value in adapter.file().items()}
    return {
        "parameters": sum(p.numel() for p in adapter.parameters.values()),
        "optimizer_bytes": sum(value.nbytes for value in kept),
        "file_bytes": len(save(file)) if file else 0,
    }


def captured(step: Callable[[], object], pool: Any) -> Callable[[], None]:
    """A step as one CUDA graph, captured after a few on a stream of their own.

    What the step leaves behind for the next one must lie in tensors that it finds there; nothing
    else of the graph's memory may be alive after it, so that graphs can share a pool.

    Raises:
        RuntimeError: the step waits for the device, or is not able to be captured.
    """
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UP):
            step()
        with _unable_to_wait():
            step()
    usual.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    finally:
        torch.cuda.set_stream(usual)  # a capture that fails stays on its own
    return graph.replay


@contextmanager
def _unable_to_wait() -> Iterator[None]:
    """Waiting for the device is an error within: found out here, it breaks no capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
