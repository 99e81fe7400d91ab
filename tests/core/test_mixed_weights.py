"""Folded weights of a mixed batch hold the bytes of folding, and one product does the rest."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbora_diffusion.core import mixed_weights
from sbora_diffusion.core.merging import fold
from sbora_diffusion.core.mixed import stacked
from sbora_diffusion.core.mixed_layers import mixed_rows, mixed_tensors
from sbora_diffusion.core.mixed_weights import folded_weights
from sbora_diffusion.core.updates import Update

IN, OUT, TOKENS = 9, 7, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def update(key: str, variant: str, indices: list[int], scale: float = 0.7) -> Update:
    g = torch.Generator().manual_seed(ord(key[0]))
    shape = (OUT, len(indices)) if variant == "fa" else (len(indices), IN)
    factor = torch.randn(shape, generator=g)
    factor[0] = 0.0  # which makes a −0 of W0 a +0
    return Update(key, variant, torch.tensor(indices), factor, scale)


GROUPS = [
    [update("a", "fa", [4, 0, 6])],  # index 0 beside padding, whose index is 0 too
    [update("b", "fb", [5])],
    [],
    [update("c", "fa", [1, 2]), update("d", "fb", [0, 2, 6])],
    [update("e", "fa", [3, 0]), update("f", "fa", [8, 3])],  # shared index
]


def layer_of(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    g = torch.Generator().manual_seed(5)
    layer = nn.Linear(IN, OUT, bias).requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=g)
    layer.weight[:, 0], layer.weight[0] = -0.0, -0.0
    return layer.to(dtype)


def input_of(rows: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> torch.Tensor:
    g = torch.Generator().manual_seed(6)
    return torch.randn(rows, tokens, IN, generator=g).to(dtype)


def banks_of(layer: nn.Linear, groups=GROUPS):
    parts = []
    for variant in ("fa", "fb"):
        own = [[u for u in group if u.variant == variant] for group in groups]
        if any(own):
            parts.append(stacked(variant, own, (OUT, IN), layer.weight))
    return {"layer": parts}


def folded_alone(layer: nn.Linear, group: list[Update]) -> torch.Tensor:
    weight = layer.weight.clone()
    fold(weight, group)
    return weight


def made(layer: nn.Linear, rows: list[int] | None = None, groups=GROUPS):
    """(banks, rows, folded weights) of one layer."""
    banks = banks_of(layer, groups)
    chosen = None if rows is None else torch.tensor(rows)
    return banks, chosen, folded_weights({"layer": layer}, banks, chosen)


def entered(layer: nn.Linear, rows: list[int] | None = None, groups=GROUPS):
    banks, chosen, weights = made(layer, rows, groups)
    assert weights
    return mixed_rows({"layer": layer}, banks, chosen, weights=weights)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [4, -1, 0, 0, 3, 1, 2]], ids=["entries", "rows"])
def test_each_weight_has_the_bytes_of_folding_its_concepts(dtype, rows):
    layer = layer_of(dtype)
    before = layer.weight.clone()
    weights = made(layer, rows)[2]["layer"]
    order = range(len(GROUPS)) if rows is None else rows
    for weight, entry in zip(weights, order, strict=True):
        expected = folded_alone(layer, GROUPS[entry] if entry >= 0 else [])
        assert torch.equal(bits(weight), bits(expected))
    assert torch.equal(bits(layer.weight), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_rows_and_their_second_half_equal_layers_with_that_concept_folded(dtype, bias, monkeypatch):
    rows = [4, -1, 0, 0, 3, 1]
    layer, x = layer_of(dtype, bias), input_of(12, dtype)
    refuse_two_paths(monkeypatch)
    with entered(layer, rows):
        single, doubled = layer(x[:6]), layer(x)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for k, entry in enumerate(rows * 2):
        own = folded_alone(layer, GROUPS[entry] if entry >= 0 else [])
        torch.testing.assert_close(doubled[k], F.linear(x[k], own, layer.bias), **close)
    assert torch.equal(single, doubled[:6]) and doubled.dtype == dtype
    torch.testing.assert_close(doubled[7], layer(x)[7], **close)


def refuse_two_paths(monkeypatch):
    for name in ("branch_rows", "join_rows"):
        monkeypatch.setattr(f"sbora_diffusion.core.mixed_layers.{name}", None)


@torch.no_grad()
def test_without_rows_consecutive_rows_share_a_weight(monkeypatch):
    layer, x = layer_of(), input_of(4, tokens=TOKENS // 2)
    groups = GROUPS[:2]
    expected = [F.linear(x[k], folded_alone(layer, groups[k // 2]), layer.bias) for k in range(4)]
    refuse_two_paths(monkeypatch)
    with entered(layer, groups=groups):
        torch.testing.assert_close(layer(x), torch.stack(expected))


@pytest.mark.parametrize("why", ["gradients", "few tokens", "autocast", "cast since"])
def test_where_one_product_is_not_right_the_rows_take_two_paths(why, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.core.mixed_layers.linear_rows", None)
    rows = [0, 1, -1]
    layer, x = layer_of(), input_of(3, tokens=TOKENS - (why == "few tokens"))
    banks, chosen, weights = made(layer, rows)
    if why == "cast since":
        layer, x = layer.double(), x.double()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with torch.set_grad_enabled(why == "gradients"), cast:
        with mixed_rows({"layer": layer}, banks, chosen):
            expected = layer(x)
        with mixed_rows({"layer": layer}, banks, chosen, weights=weights):
            assert torch.equal(layer(x), expected)
        assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("way", ["left", "interrupted"])
@torch.no_grad()
def test_afterwards_the_layers_own_forward_is_back(way):
    layer, x = layer_of(), input_of(1)
    before = layer(x)
    try:
        with entered(layer, [0]):
            assert not torch.equal(layer(x), before)
            if way == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "forward" not in vars(layer) and torch.equal(layer(x), before)


def test_what_the_rows_are_computed_from_names_the_weights_and_both_paths():
    layer = layer_of()
    banks, rows, weights = made(layer, [0, 1])
    parts = [t for bank in banks["layer"] for t in (bank.factor, bank.indices, bank.scale)]
    with mixed_rows({"layer": layer}, banks, rows, weights=weights):
        found = mixed_tensors(layer)
    expected = [*parts, rows, weights["layer"]]
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert mixed_tensors(layer) == []


def test_where_memory_is_short_or_a_layer_is_not_plain_there_are_no_weights(monkeypatch):
    plain, hooked, trained = layer_of(), layer_of(), layer_of()
    hooked.register_forward_hook(lambda *_: None)
    trained.weight.requires_grad_()
    layers = {"plain": plain, "hooked": hooked, "trained": trained}
    banks = dict.fromkeys(layers, banks_of(plain)["layer"])
    assert list(folded_weights(layers, banks)) == ["plain"]
    needed = len(GROUPS) * plain.weight.nbytes
    monkeypatch.setattr(mixed_weights, "HOST_BYTES", needed)
    assert folded_weights(layers, banks)
    monkeypatch.setattr(mixed_weights, "HOST_BYTES", needed - 1)
    assert folded_weights(layers, banks) == {} == folded_weights({}, {})
