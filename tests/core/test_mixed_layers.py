"""Hooks give each row its own concept, follow a doubled batch, and leave nothing behind."""

import pytest
import torch
from torch import nn

from sbora_diffusion.core.functional import SBORA
from sbora_diffusion.core.mixed import stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.core.updates import Update
from tests.core.test_mixed import updates

IN, OUT = 9, 7


def layer_and_input(rows: int) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(IN, OUT)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer, torch.randn(rows, 3, IN, generator=generator)


def banks_of(layer: nn.Linear, groups: list[list[Update]]):
    parts = []
    for variant in SBORA:
        of_variant = [[u for u in group if u.variant == variant] for group in groups]
        parts.append(stacked(variant, of_variant, (OUT, IN), layer.weight))
    return {"layer": parts}


def alone(layer: nn.Linear, x: torch.Tensor, group: list[Update]) -> torch.Tensor:
    y = layer(x)
    for u in group:
        y = SBORA[u.variant](y, x, u.factor, u.indices, u.scale)
    return y


@torch.no_grad()
def test_rows_of_both_variants_in_single_and_doubled_batches_equal_each_row_alone():
    groups = [updates("fa", 3), updates("fb", 2), updates("fa", 2) + updates("fb", 4)]
    layer, x = layer_and_input(8)
    rows = [2, 0, -1, 1]
    with mixed_rows({"layer": layer}, banks_of(layer, groups), torch.tensor(rows)):
        doubled, single, again = layer(x), layer(x[:4]), layer(x)
    for k, row in enumerate(rows * 2):
        expected = alone(layer, x[k], groups[row] if row >= 0 else [])
        torch.testing.assert_close(doubled[k], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single, doubled[:4], rtol=1e-5, atol=1e-5)
    assert torch.equal(again, doubled)


def test_the_gradients_of_input_and_factors_are_those_of_each_row_alone():
    groups = [updates("fa", 3), updates("fb", 2)]
    layer, x = layer_and_input(4)
    x.requires_grad_()
    banks = banks_of(layer, groups)
    for bank in banks["layer"]:
        bank.factor.requires_grad_()
    with mixed_rows({"layer": layer}, banks):
        layer(x).square().sum().backward()
    got, x.grad = x.grad, None
    torch.cat([alone(layer, x[:2], groups[0]), alone(layer, x[2:], groups[1])]).square().sum(
    ).backward()  # fmt: skip
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)
    fa, fb = banks["layer"]
    assert fa.factor.grad[0].any() and not fa.factor.grad[1].any()
    assert fb.factor.grad[1].any() and not fb.factor.grad[0].any()


@pytest.mark.parametrize("way", ["left", "interrupted"])
def test_afterwards_the_layer_has_no_hooks_and_its_own_output(way):
    layer, x = layer_and_input(2)
    before = layer(x)
    try:
        with mixed_rows({"layer": layer}, banks_of(layer, [updates("fa", 3)])):
            assert not torch.equal(layer(x), before)
            if way == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(layer(x), before)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
