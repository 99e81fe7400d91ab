"""Models through which something is learned: how they run, and as they were afterwards."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn

from sbora_diffusion.diffusion.runtime import checkpoint_gradients

_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate puts into a model. Its own `unwrap_model` leaves the last, so that the next
precision would be left out, and takes transformers' decorators off with the first."""


class LearningModels:
    """Models that compute in the precision of an accelerator, with gradient checkpointing if it is
    wanted, until `close`.

    Args:
        models: by name.
        accelerator: whose autocast they get.
        checkpointing: in train mode; what passes without gradients computes as before.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], accelerator: Accelerator, checkpointing: bool
    ) -> None:
        self.models, self.checkpointing = dict(models), checkpointing
        self._accelerator = accelerator
        self._before = {name: _own(model) for name, model in self.models.items()}
        if checkpointing:
            for model in self.models.values():
                checkpoint_gradients(model, True)

    def prepared(self) -> dict[str, nn.Module]:
        """The models as accelerate runs them, by name."""
        prepare = self._accelerator.prepare_model
        return {name: prepare(m, evaluation_mode=True) for name, m in self.models.items()}

    def train_mode(self, on: bool) -> None:
        """Dropout and the text encoders' checkpointing work in train mode alone."""
        for model in self.models.values():
            model.train(on)

    def close(self) -> None:
        """Give the models back as they were, in evaluation mode."""
        for name, model in self.models.items():
            for key in _own(model):
                delattr(model, key)
            vars(model).update(self._before[name])
        self._accelerator.free_memory()
        self.train_mode(False)
        if self.checkpointing:
            for model in self.models.values():
                checkpoint_gradients(model, False)


def _own(model: nn.Module) -> dict[str, Any]:
    """What accelerate may have put there."""
    return {key: value for key, value in vars(model).items() if key in _PREPARED}
