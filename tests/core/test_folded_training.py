"""The folded form's outputs, gradients and memory against two paths and the merged model."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sbora_diffusion.core.functional import delta_weight, folded_linear
from sbora_diffusion.core.merging import fold
from sbora_diffusion.core.tuner.folded import (
    begin_folded,
    end_folded,
    write_back,
)
from sbora_diffusion.core.updates import Update
from tests.core.folded_layers import folded, frozen
from tests.core.tuner_models import HALVES, IN, RANK, VARIANTS, inputs, make, weight_bytes

FULL = [torch.float32, torch.float64]


def gradients(layer: nn.Module, factor: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """(loss, gradient of the factor, gradient of the input)."""
    leaf = x.detach().clone().requires_grad_()
    loss = layer(leaf).double().square().mean()
    return loss.detach(), *torch.autograd.grad(loss, (factor, leaf))


def assert_close_in_norm(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert (got - expected).norm() <= bound * expected.norm() > 0


def saved(run) -> list[Tensor]:
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (tensors.append(t), t)[1], lambda t: t):
        run()
    return tensors


def problem(variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, factor, W0, indices) in float64."""
    g = torch.Generator().manual_seed(0)
    shape = (5, 3) if variant == "fa" else (3, 7)
    x, factor, weight = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 4, 7), shape, (5, 7))
    )
    indices = torch.tensor([4, 0, 3], dtype=torch.int32)
    return x.requires_grad_(), factor.requires_grad_(), weight, indices


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_the_folded_map(variant, bias):
    x, factor, weight, indices = problem(variant)
    offset = torch.ones(5, dtype=torch.float64) if bias else None

    def run(x, factor):
        delta = delta_weight(variant, factor.detach(), indices, (5, 7), 0.75)
        return folded_linear(variant, x, factor, weight + delta, offset, indices, 0.75)

    assert torch.autograd.gradcheck(run, (x, factor))


def test_second_order_gradients_are_refused_rather_than_wrong():
    x, factor, weight, indices = problem("fa")
    y = folded_linear("fa", x, factor, weight, None, indices, 1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_leading_shape_gives_the_gradients_of_the_two_path_form(variant, shape):
    two_path, one_path = frozen(0, variant=variant), folded(0, variant=variant)
    for layer in (two_path, one_path):
        layer(inputs(*shape)).square().sum().backward()
    torch.testing.assert_close(
        one_path.sbora_factor["s0"].grad, two_path.sbora_factor["s0"].grad, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_two_path_forms_before_and_after_a_step(variant, bias, dtype):
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    options = {"variant": variant, "dtype": dtype, "bias": bias, "alpha": 3.0}
    x, results = inputs(9, 5, dtype=dtype), []
    for layer in (frozen(0, **options), folded(0, **options)):
        layer.sbora_factor["s0"].data = layer.sbora_factor["s0"].to(dtype)
        factor = layer.sbora_factor["s0"]
        optimizer = torch.optim.AdamW([factor], lr=1e-2)
        before = gradients(layer, factor, x)
        factor.grad = before[1]
        optimizer.step()
        write_back([layer])
        results.append((*before, *gradients(layer, factor, x), factor.detach()))
    for two_path, one_path in zip(*results, strict=True):
        assert_close_in_norm(one_path, two_path, bound)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_pass_is_that_of_the_merged_layer_bit_for_bit(variant, autocast, dtype):
    layer, merged = folded(0, variant=variant, dtype=dtype), make(0, variant=variant, dtype=dtype)
    merged.merge()
    assert weight_bytes(layer) == weight_bytes(merged)
    x = inputs(6, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, expected = layer(x), merged(x)
        with torch.no_grad():
            drawn = layer(x)
    assert y.requires_grad and y.dtype == expected.dtype
    assert torch.equal(y, expected) and torch.equal(drawn, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_gradients_have_the_leaves_dtypes_and_are_nearly_the_fp32_ones(variant):
    layer, x = folded(0, variant=variant), inputs(64)
    _, dfactor, dx = gradients(layer, layer.sbora_factor["s0"], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, low_factor, low_x = gradients(layer, layer.sbora_factor["s0"], x)
    assert low_factor.dtype == low_x.dtype == torch.float32
    assert_close_in_norm(low_factor, dfactor, 0.02)
    assert_close_in_norm(low_x, dx, 0.02)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_increments_below_half_a_unit_of_a_half_weight_add_up_in_the_fp32_master(variant, half):
    layer = frozen(0, variant=variant, dtype=half)
    weight, factor = layer.base_layer.weight.fill_(1.0), layer.sbora_factor["s0"]
    factor.data.zero_()
    begin_folded(layer, "s0")
    moved = []
    for _ in range(5):
        with torch.no_grad():
            factor.add_(torch.finfo(half).eps / 8)
        write_back([layer])
        moved.append(bool((weight != 1.0).any()))
    assert moved == [False] * 4 + [True]  # half a unit is a tie and stays at the even 1.0


@pytest.mark.parametrize("dtype", [*FULL, *HALVES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_back_gives_the_bytes_of_a_fresh_fold_and_ending_those_of_the_base(variant, dtype):
    layer, untouched = frozen(0, variant=variant, dtype=dtype), make(0, dtype=dtype)
    weight, factor = layer.base_layer.weight, layer.sbora_factor["s0"]
    weight[:, :2] = -0.0
    original = weight.clone()
    assert begin_folded(layer, "s0") is None
    for step in range(3):
        with torch.no_grad():
            factor.mul_(-1.7)
            factor[:, 1] = -0.0 if step else 0.0
        layer.set_scale("s0", 0.3 + step)
        write_back([layer])
        expected, indices = original.clone(), layer.sbora_indices["s0"]
        fold(expected, [Update("k", variant, indices, factor.detach(), layer.scale("s0"))])
        assert torch.equal(bits(weight), bits(expected))
    end_folded(layer)
    assert torch.equal(bits(weight), bits(original)) and layer.base_layer.weight is weight
    assert weight_bytes(untouched) == weight_bytes(make(0, dtype=dtype))


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


def test_fa_saves_r_columns_of_the_input_and_fb_the_input_itself():
    tokens, x = 50, inputs(50).requires_grad_()
    hidden = x * 1.0
    for variant, kept in (("fa", (tokens, RANK)), ("fb", (tokens, IN))):
        layer = folded(0, variant=variant)
        weight = layer.base_layer.weight
        tensors = saved(lambda layer=layer: layer(hidden))
        extra = [t for t in tensors if t.data_ptr() != weight.data_ptr() and t.is_floating_point()]
        assert [tuple(t.shape) for t in extra] == [kept]
        if variant == "fb":
            assert extra[0].data_ptr() == hidden.data_ptr()
        else:
            assert extra[0].untyped_storage().nbytes() == tokens * RANK * 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_a_needed_gradient_asks_for_is_saved(variant):
    layer, x = folded(0, variant=variant), inputs(50)
    weight = layer.base_layer.weight
    assert all(t.data_ptr() != weight.data_ptr() for t in saved(lambda: layer(x)))
    layer.sbora_factor["s0"].requires_grad_(False)
    with_input = saved(lambda: layer(x.clone().requires_grad_()))
    assert [t.shape for t in with_input if t.is_floating_point()] == [weight.shape]
    assert not layer(x).requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_factor_or_scale_changed_between_forward_passes_is_seen_without_writing_back(variant):
    layer, x = folded(0, variant=variant), inputs(3)
    with torch.no_grad():
        layer.sbora_factor["s0"].mul_(2.0)
    layer.set_scale("s0", 0.25)
    other = make(0, variant=variant)
    other.sbora_factor["s0"].data.mul_(2.0)
    other.set_scale("s0", 0.25)
    other.merge()
    assert torch.equal(layer(x), other(x))


def test_a_factor_changed_between_forward_and_backward_is_an_error():
    layer, x = folded(0), inputs(3).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        layer.sbora_factor["s0"].mul_(2.0)
    write_back([layer])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(variant, reentrant):
    layer, x = folded(0, variant=variant), inputs(9)
    factor = layer.sbora_factor["s0"]
    plain = gradients(layer, factor, x)
    checkpointed = gradients_by_backward(
        lambda t: checkpoint(layer, t, use_reentrant=reentrant), factor, x
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def gradients_by_backward(run, factor: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().clone().requires_grad_()
    loss = run(leaf).double().square().mean()
    loss.backward()
    return loss.detach(), factor.grad, leaf.grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_used_twice_in_one_graph_and_accumulated_over_batches_the_gradients_add_up(variant):
    two_path, one_path = frozen(0, variant=variant), folded(0, variant=variant)
    for layer in (two_path, one_path):
        for batch in range(2):
            x = inputs(9) * (1 + batch)
            (layer(x) * layer(2 * x)).sum().backward()
    expected = two_path.sbora_factor["s0"].grad
    assert_close_in_norm(one_path.sbora_factor["s0"].grad, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_distributed_data_parallel_the_gradients_are_the_same(variant, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        layer, alone = folded(0, variant=variant), folded(0, variant=variant)
        DistributedDataParallel(layer)(inputs(9)).square().sum().backward()
        alone(inputs(9)).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(layer.sbora_factor["s0"].grad, alone.sbora_factor["s0"].grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_one_graph_and_needs_no_new_one_after_a_step(variant):
    layer, x = folded(0, variant=variant), inputs(9).requires_grad_()
    factor = layer.sbora_factor["s0"]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            got = torch.autograd.grad(compiled(x).square().sum(), (factor, x))
        expected = torch.autograd.grad(layer(x).square().sum(), (factor, x))
        assert all(map(torch.equal, got, expected))
        with torch.no_grad():
            factor.add_(0.5)
        write_back([layer])
