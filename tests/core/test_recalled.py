"""FB's input computed again from the layer norm's: the same gradients, and nothing more kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sbora_diffusion.core.recalled import origin_of, plain_norms, recalled_norms
from tests.core.folded_layers import folded
from tests.core.test_folded_training import saved
from tests.core.test_stacked_merging import Counted
from tests.core.tuner_models import HALVES, IN, inputs


class Block(nn.Module):
    """A norm whose output three folded layers read, as in attention."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN, dtype=dtype, **options).requires_grad_(False)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        self.layers = nn.ModuleList(folded(0, variant="fb", dtype=dtype) for _ in range(3))

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, h: Tensor) -> Tensor:
        x = self.between(self.norm(h))
        q, k, v = (layer(x) for layer in self.layers)
        return q * k + v

    def factors(self) -> list[nn.Parameter]:
        return [layer.sbora_factor["s0"] for layer in self.layers]


def gradients(block: Block, h: Tensor, run=None, repeats: int = 1) -> list[Tensor]:
    """Of the factors and the input."""
    leaf = h.detach().clone().requires_grad_()
    run = block if run is None else run
    loss = run(leaf * 2).float().square().mean()
    for _ in range(repeats):
        for factor in block.factors():
            factor.grad = leaf.grad = None
        loss.backward(retain_graph=True)
    return [leaf.grad, *(factor.grad for factor in block.factors())]


def marked(block: Block):
    return recalled_norms(plain_norms(block))


def assert_same_with_marks(block: Block, h: Tensor, **options) -> None:
    expected = gradients(block, h, **options)
    with marked(block):
        found = gradients(block, h, **options)
    assert all(map(torch.equal, found, expected))
    assert all(gradient.count_nonzero() for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str
)
def test_the_gradients_are_bit_for_bit_those_of_a_kept_input(dtype, options):
    assert_same_with_marks(Block(dtype, **options), inputs(9, dtype=dtype))


@pytest.mark.parametrize("repeats", [2, 3])
def test_a_second_backward_pass_through_the_same_graph_gives_them_again(repeats):
    assert_same_with_marks(Block(), inputs(9), repeats=repeats)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_them_too(reentrant):
    block = Block()
    assert_same_with_marks(
        block, inputs(9), run=lambda t: checkpoint(block, t, use_reentrant=reentrant)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_them_too_whether_it_casts_what_the_norm_reads_or_not(dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_with_marks(Block(dtype), inputs(9, dtype=dtype))


@pytest.mark.parametrize(
    "between",
    [lambda x: x.mul_(2.0), lambda x: x * 2.0, lambda x: x.flip(0), lambda x: x[1:]],
    ids=["in place", "product", "flipped", "sliced"],
)
def test_what_was_done_to_the_norms_output_is_not_forgotten(between):
    block = Block()
    block.between = between
    assert_same_with_marks(block, inputs(9))


def kept(block: Block, h: Tensor) -> list[Tensor]:
    own = {p.data_ptr() for p in block.parameters()}
    floats = [t for t in saved(lambda: block(h)) if t.is_floating_point()]
    return [t for t in floats if t.data_ptr() not in own]


def test_the_norms_output_is_not_kept():
    block, h, outputs = Block(), inputs(9).requires_grad_() * 1.0, []
    block.norm.register_forward_hook(lambda _m, _a, output: outputs.append(output.data_ptr()))
    for at, marks in enumerate((False, True)):
        with marked(block) if marks else torch.enable_grad():
            places = {tensor.data_ptr() for tensor in kept(block, h)}
        assert (outputs[at] in places) is not marks and h.data_ptr() in places


def test_three_layers_compute_it_once_and_forget_it():
    block = Block()
    with marked(block):
        x = block.norm(inputs(9).requires_grad_() * 1.0)
        origin, y = origin_of(x), sum(layer(x) for layer in block.layers)
        with Counted() as counted:
            y.sum().backward()
    assert counted.found["aten.native_layer_norm"] == 1
    assert origin.recall._output is None


def test_layers_of_which_only_some_are_asked_give_the_right_gradients():
    block, results = Block(), []
    for marks in (False, True):
        with marked(block) if marks else torch.enable_grad():
            x = block.norm(inputs(9).requires_grad_() * 1.0)
            outputs = [layer(x).square().sum() for layer in block.layers]
            found = []
            for output, factor in [*zip(outputs, block.factors(), strict=True)][1:] * 2:
                found += torch.autograd.grad(output, factor, retain_graph=True)
            results.append(found)
    assert all(map(torch.equal, *results))


def test_the_norms_input_changed_before_the_backward_pass_is_an_error():
    block = Block()
    with marked(block):
        h = inputs(9).requires_grad_() * 1.0
        y = block(h)
        with torch.no_grad():
            h.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_what_the_norm_keeps_anyway_is_recalled():
    block, x = Block(), inputs(9)
    other = type("Other", (nn.LayerNorm,), {})
    wrapped = nn.LayerNorm(IN)
    wrapped.forward = wrapped.forward
    assert plain_norms(nn.ModuleList([other(IN), wrapped, block])) == [block.norm]
    with marked(block):
        assert origin_of(block.norm(x)) is None
        with torch.no_grad():
            assert origin_of(block.norm(x.clone().requires_grad_())) is None
        assert origin_of(block.norm(x.clone().requires_grad_())) is not None
    assert origin_of(block.norm(x.clone().requires_grad_())) is None
    assert not block.norm._forward_hooks


def test_compiled_as_one_graph_the_gradients_are_the_same():
    block, h = Block(), inputs(9)
    expected = gradients(block, h)
    torch.compiler.reset()
    with marked(block):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        found = gradients(block, h, run=compiled)
    assert all(map(torch.equal, found, expected))
