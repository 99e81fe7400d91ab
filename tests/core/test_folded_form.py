"""Into the folded form and out of it: what stands in the way, and the base's bytes afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from sbora_diffusion.core.tuner.folded import (
    Obstacle,
    begin_folded,
    end_folded,
    folded_obstacle,
    write_back,
)
from sbora_diffusion.core.tuner.folded_training import folded_training
from tests.core.folded_layers import folded, frozen
from tests.core.test_tuner import PackedLinear
from tests.core.tuner_models import HALVES, IN, OUT, RANK, VARIANTS, inputs, make, weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_disabling_gives_the_bases_bytes_at_once_and_enabling_the_folded_ones(variant, dtype):
    base = weight_bytes(make(0, dtype=dtype))
    layer, x = folded(0, variant=variant, dtype=dtype), inputs(3, dtype=dtype)
    trained, y = weight_bytes(layer), layer(x)
    layer.enable_adapters(False)
    assert weight_bytes(layer) == base != trained
    assert torch.equal(layer(x), layer.base_layer(x))
    write_back([layer])
    assert weight_bytes(layer) == base
    layer.enable_adapters(True)
    assert torch.equal(layer(x), y) and weight_bytes(layer) == trained


LEAVING = {
    "deleting": lambda layer: layer.delete_adapter("s0"),
    "merging and unmerging": lambda layer: (layer.merge(), layer.unmerge()),
    "another adapter": lambda layer: (layer.set_adapter("s1"), layer(inputs(1))),
    "two adapters": lambda layer: (layer.set_adapter(["s0", "s1"]), layer(inputs(1))),
    "a gate": lambda layer: (setattr(layer, "gate", lambda *_: True), layer(inputs(1))),
    "unloading": lambda layer: layer.unload_and_optionally_merge_module(False, False, None),
    "hooks": lambda layer: (layer.base_layer.register_forward_hook(print), write_back([layer])),
}


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_out_of_the_form_puts_the_bases_bytes_back(variant, way):
    layer = frozen(0, 1, variant=variant)
    layer.set_adapter("s0")
    base = weight_bytes(layer)
    assert begin_folded(layer, "s0") is None and weight_bytes(layer) != base
    LEAVING[way](layer)
    assert weight_bytes(layer) == base


def test_with_another_adapter_active_meanwhile_the_layer_adds_both_and_folds_again_later():
    layer, live, x = frozen(0, 1), frozen(0, 1), inputs(3)
    layer.set_adapter("s0")
    begin_folded(layer, "s0")
    trained = weight_bytes(layer)
    layer.set_adapter(["s0", "s1"])
    assert torch.equal(layer(x), live(x))
    layer.set_adapter("s0")
    layer(x)
    assert weight_bytes(layer) == trained


@pytest.mark.parametrize("half", HALVES)
def test_a_model_cast_in_the_form_comes_back_as_the_cast_base(half):
    layer, x = folded(0), inputs(3).to(half)
    layer.base_layer.to(half)
    expected = make(0, dtype=half)
    base = weight_bytes(expected)
    expected.merge()
    assert torch.equal(layer(x), expected(x))
    end_folded(layer)
    assert weight_bytes(layer) == base


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_slots_state_loaded_in_the_form_moves_to_its_own_place(variant):
    layer, other = folded(0, variant=variant), make(0, variant=variant, start=9)
    base = weight_bytes(make(0))
    other.sbora_factor["s0"].data.mul_(3.0)
    state = {k: v for k, v in other.state_dict().items() if "sbora" in k}
    layer.load_state_dict(state, strict=False)
    other.merge()
    assert torch.equal(layer(inputs(3)), other(inputs(3)))
    assert weight_bytes(layer) == weight_bytes(other)
    end_folded(layer)
    assert weight_bytes(layer) == base


def test_a_copy_of_a_layer_in_the_form_is_independent():
    layer, base = folded(0), weight_bytes(make(0))
    twin = copy.deepcopy(layer)
    end_folded(twin)
    assert weight_bytes(twin) == base != weight_bytes(layer)
    end_folded(layer)
    assert weight_bytes(layer) == base


def test_the_adapters_state_does_not_show_the_form():
    layer, plain = folded(0), frozen(0)
    state, expected = layer.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state if "sbora" in k)


def test_hooks_of_the_base_layer_set_between_steps_see_the_drawing():
    layer, calls = folded(0), []
    handle = layer.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer(inputs(3))
    handle.remove()
    assert calls == [1]


def wrapped_in_lora() -> SboraLinear:
    linear = nn.Sequential(nn.Linear(IN, OUT))
    inner = get_peft_model(linear, LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    return SboraLinear(inner, "s0", SboraConfig(r=RANK), "unet.layer").requires_grad_(False)


def around(base: nn.Module) -> SboraLinear:
    base.requires_grad_(False)
    return SboraLinear(base, "s0", SboraConfig(r=RANK), "unet.layer")


def hooked() -> nn.Linear:
    base = nn.Linear(IN, OUT)
    base.register_forward_hook(lambda *_: None)
    return base


def offloaded() -> nn.Linear:
    """Like accelerate's hooks, which put another `forward` on the module."""
    base = nn.Linear(IN, OUT)
    base.forward = base.forward
    return base


def changed(layer: SboraLinear, change) -> SboraLinear:
    change(layer)
    return layer


OBSTACLES = {
    "absent": (lambda: around(nn.Linear(IN, OUT)), "other", Obstacle.ABSENT),
    "lora inside": (wrapped_in_lora, "s0", Obstacle.WRAPPED),
    "packed": (lambda: around(PackedLinear()), "s0", Obstacle.NOT_PLAIN),
    "weight norm": (lambda: around(weight_norm(nn.Linear(IN, OUT))), "s0", Obstacle.NOT_PLAIN),
    "offloaded": (lambda: around(offloaded()), "s0", Obstacle.NOT_PLAIN),
    "hooked": (lambda: around(hooked()), "s0", Obstacle.HOOKED),
    "base trains": (lambda: make(0), "s0", Obstacle.BASE_TRAINS),
    "dropout": (lambda: frozen(0, dropout=0.1).eval(), "s0", Obstacle.DROPOUT),
    "two active": (lambda: frozen(0, 1), "s0", Obstacle.NOT_ALONE),
    "merged": (lambda: changed(frozen(0), lambda a: a.merge()), "s0", Obstacle.NOT_ALONE),
    "disabled": (
        lambda: changed(frozen(0), lambda a: a.enable_adapters(False)), "s0", Obstacle.DISABLED
    ),
    "gated": (
        lambda: changed(frozen(0), lambda a: setattr(a, "gate", lambda *_: True)),
        "s0", Obstacle.GATED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OBSTACLES)
def test_where_the_form_is_impossible_the_reason_is_told_and_nothing_changes(case):
    build, adapter, reason = OBSTACLES[case]
    layer = build()
    weight = layer.weight
    before, y = weight.clone(), layer(inputs(3))
    assert folded_obstacle(layer, adapter) is reason and str(reason)
    assert begin_folded(layer, adapter) is reason
    write_back([layer])
    assert torch.equal(layer.weight, before) and torch.equal(layer(inputs(3)), y)
    assert folded_obstacle(folded(0), "s0") is None


def test_layers_that_share_a_weight_take_two_paths_and_the_others_fold():
    one, two, alone = frozen(0), frozen(0), frozen(0)
    two.base_layer.weight = one.base_layer.weight
    layers = {"one": one, "two": two, "alone": alone, "plain": nn.Linear(IN, OUT)}
    with folded_training(layers, "s0") as training:
        assert set(training.layers) == {"alone"}
        shared = dict.fromkeys(["one", "two"], Obstacle.SHARED)
        assert dict(training.obstacles) == {**shared, "plain": Obstacle.ABSENT}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_leaves_the_bases_bytes(error):
    layers = {str(n): frozen(0, variant=VARIANTS[n % 2]) for n in range(3)}
    base = weight_bytes(make(0))
    with pytest.raises(error), folded_training(layers, "s0") as training:
        training.write_back()
        assert all(weight_bytes(layer) != base for layer in layers.values())
        raise error
    assert all(weight_bytes(layer) == base for layer in layers.values())


def test_an_interrupted_write_back_leaves_the_bases_bytes(monkeypatch):
    layers, base = {str(n): frozen(0) for n in range(3)}, weight_bytes(make(0))
    write, calls = Tensor.index_copy_, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    with pytest.raises(KeyboardInterrupt), folded_training(layers, "s0") as training:
        with torch.no_grad():
            for layer in layers.values():
                layer.sbora_factor["s0"].add_(1.0)
        monkeypatch.setattr(Tensor, "index_copy_", interrupted)
        training.write_back()
    assert calls and all(weight_bytes(layer) == base for layer in layers.values())


def test_a_factor_that_is_no_number_is_refused_and_all_layers_come_back():
    layers, base = {str(n): frozen(0) for n in range(2)}, weight_bytes(make(0))
    with torch.no_grad():
        layers["1"].sbora_factor["s0"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'s0'"), folded_training(layers, "s0"):
        pass
    assert all(weight_bytes(layer) == base for layer in layers.values())
