"""Many workers, each with concepts of its own: one command under `accelerate launch` or torchrun.

One concept is trained by all of them together instead (`team.py`).

Concepts need nothing of each other, so workers need no coordinator: each takes every n-th subject,
and a concept's slot follows from the first slot and the subject's place in the command. The same
holds for processes of one machine and for machines that share no file.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sbora_diffusion.core.errors import ConfigError

Item = TypeVar("Item")

NUMBER, COUNT, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"  # what the launchers set


@dataclass(frozen=True)
class Worker:
    """One process of several.

    Attributes:
        number: 0 … count - 1.
        local: its number on its machine.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What this worker does of a list that all of them have; one item is for all."""
        return list(items[self.number :: self.count]) if len(items) > 1 else list(items)

    def device(self, wanted: str | None) -> str | None:
        """The GPU of this worker; machines with fewer GPUs than workers share them.

        Args:
            wanted: what the user asked for; one that names its GPU or is none stays as it is.
        """
        import torch

        if self.count > 1 and wanted in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return wanted


def this_worker(subjects: int) -> Worker:
    """The process that a launcher started; without one, a worker alone.

    With several subjects libraries see, from then on, a process of its own, which waits for no
    other; with one they see all.

    Raises:
        ConfigError: the launcher's variables are no numbers.
    """
    if COUNT not in os.environ:
        return Worker()
    found = {name: os.environ.get(name, "0") for name in (NUMBER, COUNT, LOCAL)}
    if subjects > 1:
        for name in found:
            os.environ.pop(name, None)
    try:
        return Worker(int(found[NUMBER]), int(found[COUNT]), int(found[LOCAL]))
    except ValueError as error:
        raise ConfigError(
            f"{NUMBER}, {COUNT} and {LOCAL} must be numbers, found {found}",
            "unset them, or start with accelerate launch",
        ) from error


def slots_of(names: Sequence[str], first: int | None, worker: Worker) -> dict[str, int] | None:
    """Name → slot, for all subjects of the command; None leaves the choice to the library, as it
    is where all workers train the same one.

    Raises:
        ConfigError: several workers have no first slot to count from, or no subject each.
    """
    together = len(names) == 1
    if worker.count > len(names) and not together:
        raise ConfigError(
            f"{worker.count} workers for {len(names)} subjects", f"start {len(names)} or fewer"
        )
    if first is None and worker.count > 1 and not together:
        raise ConfigError(
            f"{worker.count} workers cannot ask each other which slots are free",
            f"give --slot, the first of {len(names)}",
        )
    return None if first is None else {name: first + k for k, name in enumerate(names)}
