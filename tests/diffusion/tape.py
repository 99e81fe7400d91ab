"""CUDA graphs without CUDA: operations are recorded once and repeated on the tensors they had.

As under a capture, no Python runs when the tape is played, and reading a value is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
WARM_UP = 1


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, results in self._operations:
            given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _storage(old) not in given:
                    old.copy_(new)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder:
    """Takes the place of `graphs.capture`; counts what it records and plays."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, work: Callable[[], Tensor], _memory: Any) -> tuple[Callable, Tensor]:
        for _ in range(WARM_UP):
            work()
        with Tape() as tape:
            output = work()
        self.recorded += 1

        def play() -> None:
            self.played += 1
            tape.play()

        return play, output
