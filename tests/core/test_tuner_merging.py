"""One adapted layer folded and unfolded: bytes, not tolerances."""

import copy

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.merging import fold
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.core.updates import Update
from tests.core.tuner_models import (
    HALVES,
    RANK,
    VARIANTS,
    inputs,
    make,
    random_factors,
    weight_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merge_then_unmerge_restores_the_base_bytes(variant, dtype):
    layer = make(0, 1, dtype=dtype, variant=variant)
    before = weight_bytes(layer)
    layer.merge()
    assert layer.merged_adapters == ["s0", "s1"]
    assert weight_bytes(layer) != before
    layer.unmerge()
    assert weight_bytes(layer) == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_live_and_unmerged_outputs_agree(variant):
    layer, x = make(0, 1, variant=variant), inputs(3)
    live = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), live)
    layer.unmerge()
    assert torch.equal(layer(x), live)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_one_by_one_in_any_order_gives_the_bytes_of_merging_at_once(variant, dtype):
    def merged(*steps: list[str]) -> bytes:
        layer = make(0, 1, dtype=dtype, variant=variant)
        layer.update_layer("z", SboraConfig(r=RANK, start=2, variant=variant), "unet.layer")
        random_factors(layer)
        for names in steps:
            layer.merge(adapter_names=names)
        return weight_bytes(layer)

    at_once = merged(["s0", "s1", "z"])
    assert merged(["z", "s1", "s0"]) == at_once
    assert merged(["z"], ["s0"], ["s1"]) == at_once
    assert merged(["s1"], ["z", "s0"]) == at_once


def test_a_merge_is_the_fold_of_core_merging():
    layer = make(0, 1)
    expected = layer.base_layer.weight.detach().clone()
    fold(
        expected,
        [
            Update(n, "fa", layer.sbora_indices[n], layer.sbora_factor[n].detach(), 1.0)
            for n in ("s0", "s1")
        ],
    )
    layer.merge()
    assert torch.equal(layer.base_layer.weight, expected)


def test_a_merged_adapter_keeps_its_weight_while_others_are_folded_and_stay_live():
    layer, x = make(0, 1), inputs(3)
    layer.set_scale("s0", 0.5)
    live = layer(x)
    layer.merge(adapter_names=["s0"])
    torch.testing.assert_close(layer(x), live)
    layer.merge(adapter_names=["s1"])
    torch.testing.assert_close(layer(x), live)


def test_a_folded_adapter_keeps_the_factor_it_was_folded_with():
    layer, expected = make(0, 1), make(0, 1)
    expected.merge()
    layer.merge(adapter_names=["s0"])
    layer.sbora_factor["s0"].data.zero_()
    layer.merge(adapter_names=["s1"])
    assert weight_bytes(layer) == weight_bytes(expected)


def test_train_and_eval_after_a_merge_keep_it():
    layer, x = make(0), inputs(3)
    layer.merge()
    expected = layer(x)
    for mode in (layer.train, layer.eval, layer.train):
        assert torch.equal(mode()(x), expected)


def test_disabling_while_merged_gives_the_base_output_and_enabling_the_adapters():
    layer, x = make(0), inputs(3)
    live, base = layer(x), layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), live)


def test_deleting_a_folded_adapter_folds_the_others_again():
    layer, alone = make(0, 1), make(1)
    alone.sbora_factor["s1"].data = layer.sbora_factor["s1"].data
    before = weight_bytes(layer)
    layer.merge()
    alone.merge()
    layer.delete_adapter("s0")
    assert weight_bytes(layer) == weight_bytes(alone)
    layer.delete_adapter("s1")
    assert weight_bytes(layer) == before
    assert not layer.merged


def test_a_non_finite_adapter_is_refused_by_name_and_the_folded_ones_stay():
    layer = make(0, 1)
    layer.merge(adapter_names=["s0"])
    before = weight_bytes(layer)
    layer.sbora_factor["s1"].data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="'s1'"):
        layer.merge(adapter_names=["s1"])
    assert weight_bytes(layer) == before
    assert layer.merged_adapters == ["s0"]


def test_unmerging_after_a_cast_gives_the_cast_base():
    layer = make(0)
    expected = layer.base_layer.weight.detach().bfloat16()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, expected)


def test_a_copy_of_a_merged_layer_can_be_unmerged():
    layer = make(0)
    before = weight_bytes(layer)
    layer.merge()
    clone = copy.deepcopy(layer)
    clone.unmerge()
    assert weight_bytes(clone) == before
    assert layer.merged
