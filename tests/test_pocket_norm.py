"""The trainings' group normalisation is torch's, only faster in channels-last memory."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
pocket_norm = importlib.import_module("pocket_norm")


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_torch(memory):
    plain = nn.GroupNorm(4, 12, eps=1e-5)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    results = []
    for _ in range(2):
        x = torch.randn(3, 12, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 5
        x = x.contiguous(memory_format=memory).requires_grad_()
        y = plain(x)
        grads = torch.autograd.grad(y.pow(3).sum(), [x, plain.weight, plain.bias])
        results.append((y, *grads))
        pocket_norm.use_channel_sums(plain)
    assert type(plain) is pocket_norm.ChannelSums
    for expected, found in zip(*results, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * size)


def test_tokens_without_places_are_normalised_too():
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    plain = nn.GroupNorm(2, 8)
    expected = plain(x)
    pocket_norm.use_channel_sums(plain)
    assert torch.equal(plain(x), expected)
