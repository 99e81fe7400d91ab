"""Processes that train one concept together: what one of them does for all.

The launcher (`accelerate launch`, torchrun) starts them, accelerate joins them and carries their
messages. All hold the same model and the same state; each computes with its rows of a batch
(`diffusion/training_loop.py`). The first one alone owns the library's ranges and writes files.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from sbora_diffusion.core.errors import SboraError

Result = TypeVar("Result")


def size() -> int:
    """How many processes work together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the first, or alone."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def once(work: Callable[[], Result], on_cpu: bool) -> Result:
    """The result of work that the first process does; all wait for it, and get it.

    Args:
        on_cpu: whether the processes compute on a CPU.

    Raises:
        SboraError: the work's own, in all processes.
    """
    if size() == 1:
        return work()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=on_cpu)
    message: list[Any] = [None, None]
    if leads():
        try:
            message[0] = work()
        except SboraError as error:
            message[1] = error
    broadcast_object_list(message)
    if message[1] is not None:
        raise message[1]
    return message[0]


def part() -> None:
    """Take leave of the others: nothing is done together any more."""
    if size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
