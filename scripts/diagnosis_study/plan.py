"""What is trained, when it is looked at, and which concepts are heard meanwhile."""

from typing import Any

import torch
from crosstalk_study.plan import EVERY
from recipe_study.plan import PLAIN
from torch import Tensor

from sbora_diffusion.diffusion.config import TrainConfig

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the plain recipe's rates of UNet and text encoder."""
SNAPSHOTS = (75, 150, 300, 600)
"""Steps of one training after which it is measured."""
ANALYSED = 300
"""The snapshot whose layers are looked into."""
TIMESTEPS = (100, 300, 500, 700, 900)
"""At which the reference pictures are noised."""
SEEDS = (0,)

BASE, ALONE, ALL = "base", "alone", "all"
OTHERS = (ALL, *EVERY)
"""Layers in which all other concepts are heard beside the row's own: everywhere, or one group."""


def settings(variant: str, rate: float, steps: int) -> dict[str, Any]:
    """A recipe without any remedy whose rates stay constant, so that a training's step k is what a
    training of k steps ends with."""
    plain = TrainConfig(**PLAIN)
    return {
        **PLAIN,
        "variant": variant,
        "rate_unet": rate * plain.rate_unet,
        "rate_text_encoder": rate * plain.rate_text_encoder,
        "steps": steps,
        "schedule": "constant",
    }


def heard(condition: str, group: str, count: int) -> Tensor:
    """(count, count): [i, q] is 1 where concept q acts on the rows of concept i.

    Args:
        condition: BASE (none), ALONE (i itself), ALL (all), or a group of layers, in which all act,
            while in other layers i acts alone.
        group: of the layer that is asked for.
    """
    if condition == BASE:
        return torch.zeros(count, count)
    return torch.ones(count, count) if condition in (ALL, group) else torch.eye(count)
