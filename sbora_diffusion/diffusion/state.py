"""All that decides the rest of a training, taken out of it between two steps and put back.

What is trained, its moving average, what the optimizer knows; the generators of the batches as
they were before the batches that wait for the next step, which are drawn anew; the global
generators, from which dropout draws. The learning rates follow from the number of the step.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor, nn

from sbora_diffusion.core.checkpoints import Content
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.optimizers import OptimizerState, put_back, settings_of, state_of

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class Batch(NamedTuple):
    """What one pass learns from, on the CPU: rows of the lessons in order, as many of each."""

    ids: Tensor  # (B, words)
    latents: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    weight: Tensor  # (B,)


class Feed:
    """The batches of a training, drawn one pass ahead.

    Args:
        draw: the next pass's batches.
        generators: what it draws from, one of each lesson.

    Attributes:
        batches: what the next pass learns from, once `draw` was called.
        before: the generators' states before these were drawn.
    """

    def __init__(self, draw: Callable[[], list[Batch]], generators: Sequence[Generator]) -> None:
        self._draw, self.generators = draw, generators
        self.batches: list[Batch] = []
        self.before: list[Tensor] = []

    def draw(self) -> None:
        """Draw the next batches; those that were there are done with."""
        self.before = [generator.get_state() for generator in self.generators]
        self.batches = self._draw()


class TrainingState:
    """A training between two of its steps.

    Args:
        parameters: all that is trained, in the order of the optimizer's.
        optimizer: any of `optimizers.py`.
        scaler: of the loss in fp16, if there is one.
        feed: the batches.
        ema: the moving average of what is trained, if there is one.

    Attributes:
        step: how many steps are done.
        whole: false while an optimizer step changes the parameters: `content` would be neither the
            state before it nor the one after it.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        feed: Feed,
        ema: "EMAModel | None" = None,
    ) -> None:
        self.parameters, self.feed, self.ema = parameters, feed, ema
        self._optimizer, self._scaler = optimizer, scaler
        self._settings = settings_of(optimizer)
        self.step, self.whole = 0, True
        self._random: dict[str, Tensor] = {}

    def completed(self, step: int) -> None:
        """Remember the generators as they are after this step: the passes of the next one, which
        may not be completed, draw from them."""
        self._random = {f"batches_{k}": state for k, state in enumerate(self.feed.before)}
        self._random["cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state(self._device)
        self.step, self.whole = step, True

    def content(self) -> Content:
        """The state after the last completed step, on the CPU."""
        assert self.whole, "an optimizer step was interrupted"
        known = state_of(self._optimizer, self.parameters, self._settings)
        tensors = {
            "weights": {f"{k:04d}": p.detach() for k, p in enumerate(self.parameters)},
            "optimizer": known.tensors,
            "random": {name: state.view(torch.int32) for name, state in self._random.items()},
        }
        if self.ema:
            tensors["average"] = {f"{k:04d}": v for k, v in enumerate(self.ema.shadow_params)}
        document = {
            "step": self.step,
            "optimizer": known.document,
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }
        return Content(document, tensors)

    @torch.no_grad()
    def restore(self, content: Content) -> None:
        """Go on from a content; its device may be another one.

        Raises:
            FormatError: other parameters were trained; nothing was changed.
        """
        document, tensors = content
        weights = [tensors["weights"][name] for name in sorted(tensors["weights"])]
        self._refuse_others(weights)
        for parameter, saved in zip(self.parameters, weights, strict=True):
            parameter.copy_(saved)
        known = OptimizerState(tensors["optimizer"], document["optimizer"])
        put_back(self._optimizer, known)
        if self.ema:
            average = tensors["average"]
            for shadow, name in zip(self.ema.shadow_params, sorted(average), strict=True):
                shadow.copy_(average[name])
            self.ema.optimization_step = document["step"]
        if self._scaler and document["scaler"]:
            self._scaler.load_state_dict(document["scaler"])
        random = {name: state.view(torch.uint8) for name, state in tensors["random"].items()}
        torch.set_rng_state(random["cpu"])
        if self._device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self._device)
        for k, generator in enumerate(self.feed.generators):
            generator.set_state(random[f"batches_{k}"])
        self.step = document["step"]

    def finite(self) -> bool:
        """Whether all that is trained is finite; waits for the device."""
        return all(bool(torch.isfinite(p.detach()).all()) for p in self.parameters)

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device

    def _refuse_others(self, weights: list[Tensor]) -> None:
        here, found = [p.shape for p in self.parameters], [saved.shape for saved in weights]
        if here != found:
            raise FormatError(
                f"the checkpoint holds {len(found)} trained tensors of other shapes than the "
                f"{len(here)} of this training",
                "start anew without --resume",
            )
