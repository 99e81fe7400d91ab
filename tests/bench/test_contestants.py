"""Each method trains what it should, on the layers that it should, and leaves the base alone."""

from contextlib import ExitStack

import pytest
import torch

from sbora_diffusion.bench.contestants import contestant, sizes
from sbora_diffusion.bench.methods import METHODS, OFT_BLOCK, Site
from sbora_diffusion.bench.settings import FLOOR
from sbora_diffusion.bench.shapes import SHAPES, random_inputs, random_model
from sbora_diffusion.core.tuner import SboraLinear

RANK = 2
TINY = SHAPES["tiny"]
PRESENT = [name for name, method in METHODS.items() if not method.missing]


@pytest.fixture(scope="module")
def base():
    return random_model(TINY, "cpu", torch.float32, 0)


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(TINY, 2, "cpu", torch.float32, 0)


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def put(base, inputs, stack):
    """A method on a twin of the base, ready for a step."""

    def place(method):
        layers = TINY.targets(base)
        one = contestant(base, method, lambda model: Site(model, layers, RANK, stack))
        one.set_inputs(inputs)
        return one

    return place


def expected_parameters(method: str, inputs: int, outputs: int) -> int:
    """Trained numbers of one layer, from the papers' formulas."""
    lora = RANK * (inputs + outputs)
    return {
        FLOOR: 0,
        "sbora_fa_folded": RANK * outputs,
        "sbora_fa_two_paths": RANK * outputs,
        "sbora_fb_folded": RANK * inputs,
        "sbora_fb_two_paths": RANK * inputs,
        "lora": lora,
        "dora": lora + outputs,
        "oft": inputs * (OFT_BLOCK - 1) // 2,
        "shira": lora,
        "lora_fa": RANK * outputs,
        "lora_fa_projected": RANK * outputs,
        "locon": lora,
    }[method]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", PRESENT)
def test_a_method_trains_its_own_parameters_all_of_them_and_nothing_else(method, put, base, stack):
    before = snapshot(base)
    shapes = [base.get_submodule(name).weight.shape for name in TINY.targets(base)]
    one = put(method)
    trained = one.adapter.parameters
    expected = sum(expected_parameters(method, width, out) for out, width in shapes)
    assert sum(p.numel() for p in trained.values()) == expected
    start = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(2):  # a down factor moves once the up factor is no longer zero
        one.step()
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    assert all(p.grad is None for p in one.model.parameters())
    stack.close()
    after = snapshot(base)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_floor_trains_nothing_stores_nothing_and_passes_gradients_to_its_layers(put, base):
    floor = put(FLOOR)
    seen = []
    for name in TINY.targets(base):
        floor.model.get_submodule(name).register_full_backward_pre_hook(
            lambda _module, gradients: seen.append(gradients[0] is not None)
        )
    floor.step()
    assert len(seen) == len(TINY.targets(base)) == 32 and all(seen)
    assert not any(p.requires_grad for p in floor.model.parameters())
    assert sizes(floor.adapter) == {"parameters": 0, "optimizer_bytes": 0, "file_bytes": 0}


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_the_folded_form_lives_in_the_weight_and_is_written_back_after_each_step(
    variant, put, base
):
    folded, plain = put(f"sbora_{variant}_folded"), put(f"sbora_{variant}_two_paths")
    for one in (folded, plain):
        one.passes()
    pairs = zip(folded.adapter.parameters.values(), plain.adapter.parameters.values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max())
    for one in (folded, plain):
        one.forget()
        one.step()
        one.step()
    for name in TINY.targets(base):
        layer, other = folded.model.get_submodule(name), plain.model.get_submodule(name)
        assert isinstance(layer, SboraLinear) and layer.form is not None and layer.form.settle()
        weight = base.get_submodule(name).weight
        assert other.form is None and torch.equal(other.linear().weight, weight)
        merged = weight + layer.get_delta_weight("default")
        assert not torch.equal(merged, weight)
        torch.testing.assert_close(layer.linear().weight.data, merged.data)


def test_the_optimizer_keeps_two_numbers_a_parameter_and_sbora_half_of_loras(put):
    own, lora = put("sbora_fa_two_paths"), put("lora")
    for one in (own, lora):
        one.step()
    facts = sizes(own.adapter)
    counters = 4 * len(own.adapter.parameters)
    assert facts["optimizer_bytes"] == 8 * facts["parameters"] + counters
    assert facts["optimizer_bytes"] < 0.6 * sizes(lora.adapter)["optimizer_bytes"]
    assert facts["file_bytes"] < sizes(lora.adapter)["file_bytes"]


def test_contestants_share_the_bases_weights_except_where_one_writes_into_them(put, base):
    name = TINY.targets(base)[0]
    own = base.get_submodule(name).weight
    assert put("lora").model.get_submodule(name).base_layer.weight is own
    assert put("sbora_fa_folded").model.get_submodule(name).base_layer.weight is not own


def test_the_same_seed_gives_the_same_model_and_inputs(base, inputs):
    again = random_model(TINY, "cpu", torch.float32, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), base.parameters(), strict=True)
    )
    drawn = random_inputs(TINY, 2, "cpu", torch.float32, 0)
    assert all(torch.equal(a, b) for a, b in zip(drawn, inputs, strict=True))


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    random_model(TINY, "cpu", torch.float32, 0)
    assert torch.equal(torch.rand(1), expected)


def test_true_shapes_have_the_layers_of_their_models():
    with torch.device("meta"):
        counts = {
            name: len(SHAPES[name].targets(SHAPES[name].build()))
            for name in ("sd15", "sdxl", "llama8b")
        }
    assert counts == {"sd15": 128, "sdxl": 560, "llama8b": 8}
