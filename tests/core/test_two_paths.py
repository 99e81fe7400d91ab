"""The two-path form of whole layers: several live adapters, and no gradient that nobody needs."""

import pytest
import torch
from torch.nn import functional as F

from tests.core.folded_layers import frozen
from tests.core.tuner_models import VARIANTS, inputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_live_adapters_give_the_gradients_of_their_dense_sum(variant):
    layer, x = frozen(0, 1, variant=variant), inputs(9)
    dense = layer.base_layer.weight.clone()
    factors = list(layer.sbora_factor.values())
    dense = dense + sum(layer.get_delta_weight(name) for name in ("s0", "s1"))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = layer(leaves[0]), F.linear(leaves[1], dense, layer.base_layer.bias)
    got, expected = (
        torch.autograd.grad(y.square().sum(), (*factors, leaf))
        for y, leaf in zip(outputs, leaves, strict=True)
    )
    for ours, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_without_gradient_asks_the_base_layer_for_none(variant):
    layer = frozen(0, variant=variant)
    wanted: list[bool] = []
    layer.base_layer.register_forward_pre_hook(lambda _, i: wanted.append(i[0].requires_grad))
    layer(inputs(9)).sum().backward()
    assert wanted == [False] and layer.sbora_factor["s0"].grad.abs().sum() > 0
