"""Memory of one training step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def peak_bytes(step: Callable[[], object], model: nn.Module, device: str) -> int:
    """Bytes that a step needs beyond what lies there before it.

    On a GPU the peak that its allocator saw; elsewhere what autograd saves for the backward pass,
    each storage counted once and the model's own parameters not at all.
    """
    if device.startswith("cuda"):
        return _allocated(step, device)
    return _saved(step, [*model.parameters(), *model.buffers()])


def _allocated(step: Callable[[], object], device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _saved(step: Callable[[], object], own: Iterable[Tensor]) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, tuple[int, Tensor]] = {}  # the tensor keeps its address from being reused

    def pack(tensor: Tensor) -> Tensor:
        for part in _dense(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes(), part
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(count for count, _ in storages.values())


def _dense(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
