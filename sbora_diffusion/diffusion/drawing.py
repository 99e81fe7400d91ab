"""The UNet's calls while pictures are drawn, recorded as CUDA graphs and replayed.

A recording belongs to one state of the UNet: where its weights and factors lie, and what is made of
them. Folding other concepts into the weights leaves the state as it is; attaching an adapter is
another state, which is recorded anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.core.mixed_layers import mixed_tensors
from sbora_diffusion.core.mixed_weights import new_room
from sbora_diffusion.core.tuner import SboraLinear
from sbora_diffusion.diffusion.graphs import Memory, Obstacle, Recorded, device_obstacle

STATES = 4
"""How many states of a UNet keep their recordings; the one that was used longest ago goes."""


class Kept:
    """Tensors that stay where they are: others of the same shapes are written into them.

    Args:
        states: how many lists of shapes are kept; the one that was used longest ago goes.
    """

    def __init__(self, states: int = STATES) -> None:
        self._states = states
        self._tensors: dict[Any, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """What all of them take."""
        return sum(tensor.nbytes for kept in self._tensors.values() for tensor in kept)

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of these shapes, to be written to: those that an earlier call with them gave."""
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in like)
        kept = self._tensors.pop(shapes, None)
        if kept is None:
            _forget_oldest(self._tensors, self._states - 1)  # first: there may be room for one only
            kept = new_room(like)
        self._tensors[shapes] = kept
        return kept

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of these; the ones that an earlier call with such shapes gave now hold these."""
        kept = self.room(tensors)
        for place, tensor in zip(kept, tensors, strict=True):
            place.copy_(tensor)
        return kept


class RecordedUNet:
    """A UNet's calls as CUDA graphs.

    Attributes:
        obstacle: why the latest pictures were drawn without.
        kept: the factors of batches whose rows have different concepts.
        weights: such batches' folded weights, for one size of batch: they are large.
    """

    def __init__(self) -> None:
        self.obstacle: Obstacle | None = None
        self.kept, self.weights = Kept(), Kept(1)
        self._memory = Memory()
        self._recorded: dict[Any, Recorded] = {}

    @contextmanager
    def replaying(self, unet: nn.Module, wanted: bool = True) -> Iterator[None]:
        """Within, calls of the UNet are replayed where nothing stands in the way. Adapters, hooks
        and weights' places must stay; call it without gradients.

        Args:
            wanted: whether graphs are to be used at all.
        """
        device = next(unet.parameters()).device
        state = device_obstacle(device, wanted) or state_of(unet)
        if isinstance(state, Obstacle):
            self.obstacle = state
            yield
            return
        # What `nn.Module.compile` sets: the one place that a compiled model looks at, too.
        before = unet._compiled_call_impl
        plain = before or unet._call_impl
        call = _Call(plain, self._of(state, plain, device))
        setattr(unet, "_compiled_call_impl", call)  # noqa: B010
        try:
            yield
        finally:
            setattr(unet, "_compiled_call_impl", before)  # noqa: B010
            self.obstacle = call.recorded.obstacle

    def _of(self, state: Any, plain: Any, device: torch.device) -> Recorded:
        recorded = self._recorded.pop(state, None)
        if recorded is None:
            recorded = Recorded(partial(_predicted, plain), device, memory=self._memory)
        self._recorded[state] = recorded
        _forget_oldest(self._recorded, STATES)
        return recorded


class _Call:
    """A UNet's call as diffusers' pipeline makes it."""

    def __init__(self, plain: Any, recorded: Recorded) -> None:
        self.plain, self.recorded = plain, recorded

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        if return_dict or any(value is not None for value in others.values()):
            return self.plain(
                sample, timestep, encoder_hidden_states, return_dict=return_dict, **others
            )
        return (self.recorded(sample, torch.as_tensor(timestep), encoder_hidden_states),)


def _predicted(plain: Any, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
    return plain(sample, timestep, states, return_dict=False)[0]


def state_of(unet: nn.Module) -> tuple[Any, ...] | Obstacle:
    """What a recording of a UNet's calls depends on, or why there can be none."""
    autocast = torch.is_autocast_enabled(next(unet.parameters()).device.type)
    forward = vars(unet).get("forward")  # set by accelerate while bf16 trains
    parts: list[Any] = [unet._compiled_call_impl, forward, unet.training, autocast]
    for module in unet.modules():
        part = _part(module)
        if isinstance(part, Obstacle):
            return part
        parts.extend(part)
    for tensors in (unet.parameters(), unet.buffers()):
        parts.extend((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors)
    return tuple(parts)


def _part(module: nn.Module) -> tuple[Any, ...] | Obstacle:
    """What one module adds to the state beside its parameters and buffers."""
    mixed = mixed_tensors(module)
    if mixed is None or hasattr(module, "_hf_hook"):
        return Obstacle.HOOKED
    places = tuple((tensor.data_ptr(), tensor.shape) for tensor in mixed)
    if isinstance(module, SboraLinear):
        return Obstacle.GATED if module.gate is not None else (*places, module.makeup())
    if isinstance(module, BaseTunerLayer):
        return Obstacle.FOREIGN
    if isinstance(module, Attention):
        known = type(module.processor) in (AttnProcessor, AttnProcessor2_0)
        return (*places, type(module.processor)) if known else Obstacle.ATTENTION
    return places


def _forget_oldest(entries: dict[Any, Any], most: int) -> None:
    while len(entries) > most:
        del entries[next(iter(entries))]
