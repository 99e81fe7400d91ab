"""The kernel distance between two sets of pictures (KID, arXiv 1801.01401), by torchmetrics.

Published figures are of Inception features; any others have a scale of their own.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, DataError

SUBSETS, SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets of `subset_size` pictures of each set."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    images: Tensor, others: Tensor, seed: int, subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy, (N, D) and (M, D).

    The kernel is (cos + 1)³. With fewer than `size` pictures a subset is as large as the smaller
    set; where that is both sets, there is one subset.

    Args:
        seed: decides the subsets.

    Raises:
        ConfigError: torchmetrics is not installed.
        DataError: a set has fewer than two pictures.
    """
    check_comparable(len(images), len(others))
    smaller, larger = sorted((len(images), len(others)))
    size = min(size, smaller)
    count = 1 if size == larger else subsets
    mean, deviation = _by_torchmetrics(images, others, seed, count, size)
    return KernelDistance(mean, deviation, count, size)


def check_comparable(images: int, others: int) -> None:
    """Refuse what `kernel_distance` would refuse, before features are computed.

    Args:
        images, others: number of pictures in each set.

    Raises:
        ConfigError, DataError: see `kernel_distance`.
    """
    if min(images, others) < 2:
        raise DataError(
            f"the kernel distance needs two pictures or more of each set, found {images} and "
            f"{others}",
            "add pictures; a hundred or more of each give a steady figure",
        )
    _metric()


def _by_torchmetrics(
    images: Tensor, others: Tensor, seed: int, subsets: int, size: int
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept in memory
        metric = _metric()(nn.Identity(), subsets, size, gamma=1.0)
    metric.update(F.normalize(others, dim=-1), real=True)
    metric.update(F.normalize(images, dim=-1), real=False)
    # It draws its subsets from the global random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def _metric() -> type:
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the kernel distance needs torchmetrics, and {error.name} is not installed",
            "pip install 'sbora-diffusion[kid]'",
        ) from error
    return KernelInceptionDistance
