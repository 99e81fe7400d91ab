"""The kernel distance against its definition."""

import sys

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.evaluation.kid import kernel_distance
from tests.evaluation.test_metrics import cosine, features


def naive_distance(images, others):
    """Equation 4 of arXiv 1801.01401 with m = n, on the kernel (cos + 1)³."""

    def kernel(a, b):
        return (cosine(a, b) + 1) ** 3

    m = len(images)
    within = sum(
        kernel(group[i], group[j])
        for group in (images, others)
        for i in range(m)
        for j in range(m)
        if i != j
    )
    across = sum(kernel(a, b) for a in images for b in others)
    return within / (m * (m - 1)) - 2 * across / m**2


@pytest.fixture
def torchmetrics():
    return pytest.importorskip("torchmetrics")


@pytest.mark.parametrize("count", (2, 6))
def test_it_is_the_unbiased_discrepancy_of_all_pictures_where_these_are_few(torchmetrics, count):
    images, others = features(count, 1), features(count, 2)
    found = kernel_distance(images, others, seed=0)
    expected = naive_distance(images.tolist(), others.tolist())
    assert found.mean == pytest.approx(expected, abs=1e-4)
    assert (found.deviation, found.subsets, found.subset_size) == (0, 1, count)


def test_subsets_are_as_large_as_the_smaller_set_and_follow_the_seed_alone(torchmetrics):
    images, others = features(9, 3), features(4, 4)
    before = torch.random.get_rng_state()
    found = kernel_distance(images, others, seed=5, subsets=10)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found.subsets, found.subset_size) == (10, 4) and found.deviation > 0
    torch.manual_seed(99)
    assert kernel_distance(images, others, seed=5, subsets=10) == found
    assert kernel_distance(images, others, seed=6, subsets=10) != found
    assert kernel_distance(images, others, seed=5, subsets=10, size=3).subset_size == 3


def test_different_sets_are_farther_apart_than_like_ones(torchmetrics):
    same, like, far = features(40, 6), features(40, 7), features(40, 8).abs()
    assert kernel_distance(same, like, 0).mean < kernel_distance(same, far, 0).mean - 0.5


@pytest.mark.parametrize(("count", "others"), ((1, 5), (5, 1), (0, 0)))
def test_too_few_pictures_are_refused(count, others):
    words = f"two pictures or more of each set, found {count} and {others}"
    with pytest.raises(DataError, match=words):
        kernel_distance(features(count, 1), features(others, 2), seed=0)


def test_a_missing_torchmetrics_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ConfigError, match=r"is not installed.*sbora-diffusion\[kid\]"):
        kernel_distance(features(3, 1), features(3, 2), seed=0)
