"""What is seen of a training while Trainer runs it."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from sbora_diffusion.core.errors import NonFiniteError

LOGGED = 10
"""Steps between two losses that are kept."""
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
        self.seconds, self._began, self._loss = 0.0, 0.0, math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
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
        self.seconds = time.perf_counter() - self._began
        # Trainer does not save its running sum of losses.
        control.should_log |= control.should_save or state.global_step == self.steps
        self.report(state.global_step, self.steps, self._loss)
