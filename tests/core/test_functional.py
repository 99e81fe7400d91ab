"""The two linear maps against a dense one-hot oracle and the paper's worked examples."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sbora_diffusion.core.functional import (
    SBORA,
    delta_weight,
    one_hot,
    sbora_fa,
    sbora_fb,
    scaling,
)

IN, OUT, RANK, SCALE = 7, 5, 3, 0.75
VARIANTS = ["fa", "fb"]
INDICES = {"fa": [6, 0, 3], "fb": [4, 1, 0]}


def problem(variant: str, shape: tuple[int, ...] = (2, 4), dtype=torch.float64, seed: int = 0):
    """(y, x, factor, indices) with a non-zero factor, leaves that require gradients."""
    g = torch.Generator().manual_seed(seed)
    sizes = (*shape, OUT), (*shape, IN), (OUT, RANK) if variant == "fa" else (RANK, IN)
    y, x, factor = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    leaves = [t.requires_grad_() for t in (y, x, factor)]
    return *leaves, torch.tensor(INDICES[variant], dtype=torch.int32)


def dense(variant: str, y: Tensor, x: Tensor, factor: Tensor, indices: Tensor) -> Tensor:
    """The oracle: both factors as full matrices, y + scale · (x A^T) B^T."""
    if variant == "fa":
        down, up = one_hot(indices, IN).to(factor.dtype), factor
    else:
        down, up = factor, one_hot(indices, OUT).to(factor.dtype).T
    return y + SCALE * (x @ down.T) @ up.T


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad(output, inputs, cotangent)


def saved_shapes(run) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        run()
    return shapes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 2, 3), (0,), (3, 0)])
def test_values_and_gradients_equal_the_dense_oracle_for_any_leading_shape(variant, shape):
    y, x, factor, indices = problem(variant, shape)
    ours = SBORA[variant](y, x, factor, indices, SCALE)
    oracle = dense(variant, y, x, factor, indices)
    torch.testing.assert_close(ours, oracle)
    pairs = zip(gradients(ours, (y, x, factor)), gradients(oracle, (y, x, factor)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gradcheck_first_and_second_order(variant, index_dtype):
    y, x, factor, indices = problem(variant)

    def run(y, x, factor):
        return SBORA[variant](y, x, factor, indices.to(index_dtype), SCALE)

    assert torch.autograd.gradcheck(run, (y, x, factor))
    assert torch.autograd.gradgradcheck(run, (y, x, factor))


def test_worked_example_of_the_paper_for_fa():
    """Equations 9 and 10: r = 2, 4 x 4, A = [e1; e4]."""
    b, w = torch.arange(1.0, 9).reshape(4, 2), torch.arange(10.0, 26).reshape(4, 4)
    delta = delta_weight("fa", b, torch.tensor([0, 3]), (4, 4), 1.0)
    assert delta.tolist() == [[1, 0, 0, 2], [3, 0, 0, 4], [5, 0, 0, 6], [7, 0, 0, 8]]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(sbora_fa(w @ x, x, b, torch.tensor([0, 3]), 1.0), (w + delta) @ x)


def test_worked_example_of_the_paper_for_fb():
    """Equations 11 and 12: r = 2, 4 x 4, B = [e1 e4].

    The paper prints b12 twice in the second factor of Equation 11; its result shows b21 is meant.
    """
    a, w = torch.arange(1.0, 9).reshape(2, 4), torch.arange(10.0, 26).reshape(4, 4)
    delta = delta_weight("fb", a, torch.tensor([0, 3]), (4, 4), 1.0)
    assert delta.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8]]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(sbora_fb(w @ x, x, a, torch.tensor([0, 3]), 1.0), (w + delta) @ x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_delta_weight_is_the_product_of_the_dense_factors_in_fp32(variant):
    _, _, factor, indices = problem(variant, dtype=torch.bfloat16)
    delta = delta_weight(variant, factor, indices, (OUT, IN), SCALE)
    zero, eye = torch.zeros(IN, OUT), torch.eye(IN)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.T, dense(variant, zero, eye, factor.float(), indices))


def test_scale_is_weight_times_alpha_over_rank():
    assert scaling(alpha=16, rank=8, weight=0.5) == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_factor_leaves_the_output_unchanged(variant, dtype):
    y, x, factor, indices = problem(variant, dtype=dtype)
    assert torch.equal(SBORA[variant](y, x, torch.zeros_like(factor), indices, SCALE), y)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fa_saves_the_gathered_columns_and_never_the_whole_input(dropout):
    y, x, factor, indices = problem("fa", (64,), torch.float32)
    hidden = x * 1.0
    shapes = saved_shapes(lambda: sbora_fa(y, hidden, factor, indices, SCALE, dropout))
    assert (64, RANK) in shapes
    assert (64, IN) not in shapes
    assert sum(s == (64, RANK) for s in shapes) == (1 if dropout == 0 else 2)


def test_fb_saves_the_input_once_and_nothing_of_the_output_size():
    y, x, factor, indices = problem("fb", (64,), torch.float32)
    shapes = saved_shapes(lambda: sbora_fb(y, x, factor, indices, SCALE))
    assert sorted(shapes) == sorted([(64, IN), (RANK, IN), (RANK,)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_base_with_fp32_factor_keeps_the_base_dtype_and_an_fp32_gradient(variant, half):
    y, x, factor, indices = problem(variant, dtype=torch.float32)
    y_half, x_half = y.detach().to(half), x.detach().to(half).requires_grad_()
    out = SBORA[variant](y_half, x_half, factor, indices, SCALE)
    expected = dense(variant, y_half.float(), x_half.float(), factor, indices)
    assert out.dtype == half
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    dx, dfactor = torch.autograd.grad(out.float().sum(), (x_half, factor))
    assert (dx.dtype, dfactor.dtype) == (half, torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_inside_autocast_the_product_is_low_precision_and_the_output_keeps_its_dtype(variant, base):
    y, x, factor, indices = problem(variant, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = SBORA[variant](y.to(base), x.to(base), factor, indices, SCALE)
    low = SBORA[variant](
        torch.zeros_like(y), x.bfloat16(), (SCALE * factor).bfloat16(), indices, 1.0
    )
    assert out.dtype == base
    assert torch.equal(out, y.to(base) + low.to(base))
    assert torch.autograd.grad(out.float().sum(), factor)[0].dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_inside_autocast_equals_backward_outside(variant):
    y, x, factor, indices = problem(variant, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(SBORA[variant](y, x, factor, indices, SCALE), (x, factor))
        out = SBORA[variant](y, x, factor, indices, SCALE)
    for got, expected in zip(inside, gradients(out, (x, factor)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_same_dropout(variant, reentrant):
    y, x, factor, indices = problem(variant)

    def run(y, x, factor):
        return SBORA[variant](y, x, factor, indices, SCALE, 0.5)

    def grads(call) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            leaves = [t.detach().clone().requires_grad_() for t in (y, x, factor)]
            call(*leaves).square().sum().backward()
            return [leaf.grad for leaf in leaves]

    plain = grads(run)
    replayed = grads(lambda *a: checkpoint(run, *a, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_used_twice_in_one_graph_the_gradients_add_up(variant):
    y, x, factor, indices = problem(variant)
    once = SBORA[variant](y, x, factor, indices, SCALE)
    ours = SBORA[variant](once, x * 2, factor, indices, SCALE)
    oracle = dense(variant, dense(variant, y, x, factor, indices), x * 2, factor, indices)
    pairs = zip(gradients(ours, (y, x, factor)), gradients(oracle, (y, x, factor)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph_forward_and_backward(variant, dropout, autocast):
    y, x, factor, indices = problem(variant, (3,), torch.float32)

    def run(y, x, factor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return SBORA[variant](y, x, factor, indices, SCALE, dropout)

    torch.compiler.reset()
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(y, x, factor)
    grads = gradients(out, (y, x, factor))
    if dropout == 0.0:
        eager = run(y, x, factor)
        assert torch.equal(out, eager)
        assert all(map(torch.equal, grads, gradients(eager, (y, x, factor))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_seeded_by_its_generator_and_keeps_the_mean(variant):
    y, x, factor, indices = problem(variant, (20_000,))
    y, x = torch.zeros_like(y), torch.ones_like(x)

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return SBORA[variant](y, x, factor, indices, SCALE, 0.25, generator)

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(state, torch.get_rng_state())
    expected = SBORA[variant](y[0], x[0], factor, indices, SCALE)
    torch.testing.assert_close(run(1).mean(0), expected, atol=0.05, rtol=0.02)


def test_the_gradient_of_fa_uses_the_mask_of_the_forward_pass():
    """With B = I and scale 1, the output shows the mask, and dx must be that mask."""
    x = torch.ones(50, 4, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    out = sbora_fa(torch.zeros(50, 4), x, torch.eye(4), torch.arange(4), 1.0, 0.5, generator)
    assert set(out.detach().unique().tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out)
