"""Gradients added to standing ones by one list operation."""

import pytest
import torch
from torch import Tensor, nn

from sbora_diffusion.diffusion.graphs import adding_at_once
from tests.core.test_stacked_merging import Counted


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, generator=g)) for _ in range(5)]


def work(trained: list[nn.Parameter], x: Tensor) -> Tensor:
    """A loss that the last one takes no part in; its gradients have other strides."""
    loss = sum((x @ parameter.T).square().sum() for parameter in trained[:-1])
    loss.backward()
    return loss.detach()


def test_they_are_those_of_autograd_where_they_were_before():
    one, other = parameters(), parameters()
    places = []
    for parameter in [*one[1:], *other[1:]]:
        parameter.grad = torch.ones_like(parameter)
        places.append(parameter.grad)
    for scale in (1.0, 2.0):
        x = torch.full((2, 4), scale)
        assert torch.equal(work(one, x), adding_at_once(lambda t: work(other, t), other, x))
    kept = [parameter.grad for parameter in (*one[1:], *other[1:])]
    assert all(grad is place for grad, place in zip(kept, places, strict=True))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    assert torch.equal(other[-1].grad, torch.ones(3, 4))


def test_there_is_one_addition_for_all():
    trained = parameters()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with Counted() as counted:
        adding_at_once(lambda t: work(trained, t), trained, torch.ones(2, 4))
    assert counted.found["aten._foreach_add_"] == 1 and "aten.add_" not in counted.found


def test_work_that_fails_leaves_the_standing_gradients():
    trained = parameters()
    trained[0].grad = place = torch.ones(3, 4)

    def fails(_: Tensor) -> Tensor:
        trained[0].sum().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adding_at_once(fails, trained, torch.ones(1))
    assert trained[0].grad is place and torch.equal(place, torch.ones(3, 4))
