"""Optimizers by name, and what a checkpoint keeps of any of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError

OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
BETAS = (0.9, 0.99)


def optimizer_named(
    name: OptimizerName, groups: list[dict[str, Any]], weight_decay: float, on_gpu: bool
) -> torch.optim.Optimizer:
    """The optimizer of groups of parameters.

    Raises:
        ConfigError: its package is not installed.
    """
    common: dict[str, Any] = {"betas": BETAS, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(groups, **common, fused=on_gpu or None)
    try:
        if name == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **common)
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError(
            f"optimizer {name!r} needs a package that is missing: {error.name}",
            "pip install 'sbora-diffusion[opt]'",
        ) from error
    return Prodigy(
        [{**group, "lr": 1.0, "initial_lr": 1.0} for group in groups],  # it knows one rate alone
        **common, use_bias_correction=True, safeguard_warmup=True,
    )  # fmt: skip


class OptimizerState(NamedTuple):
    """What an optimizer knows after some steps.

    Attributes:
        tensors: "0003.exp_avg" → of the fourth parameter; bytes as int32.
        document: the numbers, as JSON: those of each parameter, and of the groups those that have
            changed.
    """

    tensors: dict[str, Tensor]
    document: dict[str, Any]


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each group but the rates, which follow from the step."""
    return [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, int | float) and key not in ("lr", "initial_lr")
        }
        for group in optimizer.param_groups
    ]


def state_of(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    initial: Sequence[Mapping[str, Any]],
) -> OptimizerState:
    """Take the state out of an optimizer.

    Args:
        parameters: in the order of its groups.
        initial: its `settings_of` before the first step.
    """
    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, Any]] = []
    points: list[dict[str, float]] = []
    for k, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        held = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        whole = {name: value for name, value in held.items() if value.dim() > 0}
        tensors |= {f"{k:04d}.{name}": _storable(value) for name, value in whole.items()}
        points.append({name: held[name].item() for name in held.keys() - whole.keys()})
        numbers.append({name: value for name, value in state.items() if name not in held})
    groups = [
        {key: value for key, value in now.items() if then.get(key) != value}
        for then, now in zip(initial, settings_of(optimizer), strict=True)
    ]
    return OptimizerState(tensors, {"numbers": numbers, "points": points, "groups": groups})


def put_back(optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Give an optimizer of the same parameters a state again."""
    numbers, points = saved.document["numbers"], saved.document["points"]
    state: dict[int, dict[str, Any]] = {}
    for k, (own, single) in enumerate(zip(numbers, points, strict=True)):
        prefix = f"{k:04d}."
        tensors = {
            name.removeprefix(prefix): _restored(value)
            for name, value in saved.tensors.items()
            if name.startswith(prefix)
        }
        found = {**own, **{n: torch.tensor(value) for n, value in single.items()}, **tensors}
        if found:
            state[k] = found
    groups = optimizer.state_dict()["param_groups"]
    for group, changed in zip(groups, saved.document["groups"], strict=True):
        group.update(changed)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _storable(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.dtype == torch.uint8 else tensor


def _restored(tensor: Tensor) -> Tensor:
    return tensor.to(torch.uint8) if tensor.dtype == torch.int32 else tensor
