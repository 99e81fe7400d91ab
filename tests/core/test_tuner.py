"""One adapted layer: output, dtypes, indices, scales; defects known from other SBoRA code."""

import random

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from sbora_diffusion.core.allocation import indices_for
from sbora_diffusion.core.errors import CapacityError, ConfigError, FormatError
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from tests.core.tuner_models import (
    HALVES,
    IN,
    OUT,
    RANK,
    VARIANTS,
    inputs,
    make,
    random_factors,
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_new_adapter_leaves_the_output_bit_identical(variant, dtype):
    base = nn.Linear(IN, OUT).to(dtype)
    layer = SboraLinear(base, "a", SboraConfig(r=RANK, variant=variant), "unet.layer")
    x = inputs(3, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 1, 2, 5), (0,)])
def test_the_output_is_the_base_plus_the_delta_weights_for_any_shape(variant, shape):
    layer, x = make(0, 2, variant=variant), inputs(*shape)
    delta = layer.get_delta_weight("s0") + layer.get_delta_weight("s2")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)


@pytest.mark.parametrize(("variant", "width"), [("fa", IN), ("fb", OUT)])
def test_indices_are_those_of_the_slot_and_the_canonical_name(variant, width):
    layer = make(1, variant=variant, allocation_seed=5)
    expected = indices_for("unet.layer", width, RANK, 2 * RANK, 5)
    assert layer.sbora_indices["s1"].dtype == torch.int32
    assert torch.equal(layer.sbora_indices["s1"], expected)


def test_an_explicit_start_overrides_the_slot():
    layer = make(1, start=3)
    assert torch.equal(layer.sbora_indices["s1"], indices_for("unet.layer", IN, 3, 7, 0))


def test_drawing_indices_leaves_every_global_generator_alone():
    base = nn.Linear(IN, OUT)
    python, torch_state = random.getstate(), torch.get_rng_state()
    SboraLinear(base, "a", SboraConfig(r=RANK), "unet.layer")
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_range_beyond_the_width_is_a_capacity_error():
    with pytest.raises(CapacityError, match=r"unet\.layer"):
        make(IN // RANK)


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"variant": "fc"}, {"dropout": 1.0}, {"slot": -1}, {"start": -1}],
    ids=lambda o: next(iter(o)),
)
def test_a_configuration_out_of_range_is_refused(options):
    with pytest.raises(ConfigError):
        SboraConfig(**options)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 1), nn.MultiheadAttention(16, 2).out_proj], ids=["conv", "mha"]
)
def test_a_layer_that_is_not_linear_is_refused_by_name(module):
    with pytest.raises(ConfigError, match=r"'unet\.x'"):
        SboraLinear(module, "a", SboraConfig(r=2), "unet.x")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", HALVES)
def test_half_base_with_fp32_factor_trains_outside_and_inside_autocast(variant, half):
    layer, x = make(0, dtype=half, variant=variant), inputs(3, dtype=half)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            y = layer(x)
        y.float().square().sum().backward()
        factor = layer.sbora_factor["s0"]
        assert (y.dtype, factor.dtype, factor.grad.dtype) == (half, torch.float32, torch.float32)
        assert factor.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_and_train_switch_the_dropout(variant):
    layer, x = make(0, variant=variant, dropout=0.5), inputs(50)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(layer(x), layer(x))


def test_a_layer_added_to_a_model_in_eval_mode_is_in_eval_mode():
    base = nn.Linear(IN, OUT).eval()
    assert not SboraLinear(base, "a", SboraConfig(r=RANK), "unet.layer").training
    assert SboraLinear(base.train(), "a", SboraConfig(r=RANK), "unet.layer").training


def test_fa_with_dropout_does_not_store_the_whole_input():
    layer, x = make(0, dropout=0.5), inputs(64).requires_grad_()
    layer.base_layer.requires_grad_(False)
    stored: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (stored.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        layer(x * 1.0)
    assert (64, RANK) in stored
    assert (64, IN) not in stored


def test_scaling_and_unscaling_is_exact():
    layer = make(0, alpha=3.0)
    layer.set_scale("s0", 0.7)
    before = layer.scale("s0")
    assert before == 0.7 * (3.0 / RANK)
    for factor in (0.3, 0.1, 1e-30):
        layer.scale_layer(factor)
        assert layer.scale("s0") == pytest.approx(before * factor)
        layer.unscale_layer(factor)
        assert layer.scale("s0") == before
    layer.unscale_layer()
    assert layer.scale("s0") == 3.0 / RANK


def test_indices_stay_integers_through_casts_and_travel_in_the_state_dict():
    layer, other = make(0).half(), make(2)
    assert layer.sbora_indices["s0"].dtype == torch.int32
    state = {k.replace("s0", "s2"): v for k, v in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other.sbora_indices["s2"], layer.sbora_indices["s0"])


class PackedLinear(nn.Linear):
    """Like bitsandbytes' 4-bit layer: the weight is packed integers, forward unpacks them."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.dense = self.weight.detach().clone()
        packed = torch.zeros(IN * OUT // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense, self.bias)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_quantized_base_trains_and_refuses_to_be_merged(variant):
    layer = SboraLinear(PackedLinear(), "a", SboraConfig(r=RANK, variant=variant), "unet.layer")
    random_factors(layer)(inputs(3)).sum().backward()
    assert layer.sbora_factor["a"].grad.abs().sum() > 0
    with pytest.raises(FormatError, match="unquantized"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_one_graph(variant):
    layer, x = make(0, 1, variant=variant), inputs(3)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert layer.sbora_factor["s0"].grad is not None


def test_two_adapters_with_one_slot_warn_and_with_two_slots_do_not(recwarn):
    model = get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)), SboraConfig(r=RANK, target_modules=["0"]), "a"
    )
    model.add_adapter("b", SboraConfig(r=RANK, slot=1, target_modules=["0"]))
    model.add_adapter("c", SboraConfig(r=RANK, variant="fb", target_modules=["0"]))
    assert not [w for w in recwarn if "own the same indices" in str(w.message)]
    with pytest.warns(UserWarning, match="'a' own the same indices"):
        model.add_adapter("d", SboraConfig(r=2, slot=1, target_modules=["0"]))
