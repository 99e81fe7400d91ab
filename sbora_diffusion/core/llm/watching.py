"""What is seen of a training while Trainer runs it."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from sbora_diffusion.core.errors import NonFiniteError

Report = Callable[[int, int, float], None]


class Watch(TrainerCallback):
    """Losses, time, and the end of a training that does not converge.

    Args:
        steps: of the whole training.
        report: called with (steps done, steps, loss) after each.

    Raises:
        NonFiniteError: from within the training, when a loss is not finite.
    """

    def __init__(self, steps: int, report: Report) -> None:
        self.steps, self.report = steps, report
        self.losses: list[tuple[int, float]] = []
        self._marks: list[float] = []
        self._loss = math.nan

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the last step."""
        return self._marks[-1] - self._marks[0] if self._marks else 0.0

    @property
    def step_seconds(self) -> float:
        """The median of all steps but the first, in which kernels are chosen; NaN without them."""
        steps = [after - before for before, after in pairwise(self._marks[1:])]
        return statistics.median(steps) if steps else math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks = [time.perf_counter()]
        logs = [log for log in state.log_history if "loss" in log]
        self.losses = [(log["step"], log["loss"]) for log in logs]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner: Any = getattr(kwargs.get("model"), "base_model", None)
        if hasattr(tuner, "update_and_allocate"):  # AdaLoRA moves its ranks between the layers
            tuner.update_and_allocate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = float(logs["loss"])
            if not math.isfinite(self._loss):
                raise NonFiniteError(
                    f"the loss is not finite after step {state.global_step}",
                    "lower the rate, or train in another dtype",
                )
            self.losses.append((state.global_step, self._loss))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append(time.perf_counter())
        # Trainer does not save its running sum of losses.
        control.should_log |= control.should_save or state.global_step == self.steps
        self.report(state.global_step, self.steps, self._loss)


def start_memory() -> None:
    """Count a GPU's memory from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """The most bytes that tensors have taken since, of the process that took most; 0 on a CPU. All
    processes call it."""
    own = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(gather_object([own]))
