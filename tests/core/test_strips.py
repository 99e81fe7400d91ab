"""Reading and writing the strips of many weights: the kernels, run by Triton's interpreter, against
`index_select` and `index_copy_`."""

import importlib
import importlib.util
import sys

import pytest
import torch
from torch import Tensor, nn

from sbora_diffusion import core
from sbora_diffusion.core import gradients, strips
from sbora_diffusion.core.folded_set import FoldedSet
from sbora_diffusion.core.rewriting import Rewriting
from sbora_diffusion.core.strips import Strips, gathered
from tests.core.test_rewriting import bits, case, fold, moved, prepared
from tests.core.test_stacked_merging import (
    SHAPES,
    content,
    library,
    model,
    one_by_one,
)

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
SIZES = [(5, 7), (40, 33), (1, 9), (5, 7)]


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Lets the CPU have the kernels, and gets the name of each that runs."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined
    name = "sbora_diffusion.core.kernels"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(core, "kernels", raising=False)
    kernels, found = importlib.import_module(name), []
    for kernel in ("copy_strips", "gather_columns"):
        real = getattr(kernels, kernel)
        counted = lambda *a, real=real, kernel=kernel: (found.append(kernel), real(*a))[1]  # noqa: E731
        monkeypatch.setattr(kernels, kernel, counted)
    monkeypatch.setattr(strips, "KINDS", ("cpu",))
    monkeypatch.setattr(strips, "_WORKS", {})
    yield found
    sys.modules.pop(name)
    delattr(core, "kernels")


def weights(dtype: torch.dtype, sizes=SIZES) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g).to(dtype) for size in sizes]


def places(dim: int, of: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randperm(w.shape[dim], generator=g)[: 1 + k] for k, w in enumerate(of)]


def select(weight: Tensor, dim: int, at: Tensor) -> Tensor:
    return weight[:, at] if dim else weight[at]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_one_kernel_reads_and_writes_weights_of_all_sizes(dim, dtype, launches):
    many = [w for w in weights(dtype) if dim or len(w) > 4]
    at = places(dim, many)
    together = Strips(dim, many, at)
    launches.clear()
    flat = together.read()
    expected = [select(w, dim, here) for w, here in zip(many, at, strict=True)]
    for view, part in zip(together.views(flat), expected, strict=True):
        assert torch.equal(bits(view), bits(part))
    others = [torch.full_like(w.float(), 3.0).to(dtype) for w in many]
    versions = [w._version for w in others]
    Strips(dim, others, at).write(flat)
    assert launches == ["copy_strips"] * 2
    for w, part, here, version in zip(others, expected, at, versions, strict=True):
        untouched = torch.full_like(w.float(), 3.0)
        untouched.index_copy_(dim, here, part.float())
        assert torch.equal(w.float(), untouched) and w._version > version


@pytest.mark.parametrize("dtype", TYPES[:4])
@pytest.mark.parametrize("dim", [0, 1])
def test_without_kernels_the_entries_are_the_same(dim, dtype):
    many = [w for w in weights(dtype) if dim or len(w) > 4]
    at = places(dim, many)
    together = Strips(dim, many, at)
    flat = together.read()
    expected = [select(w, dim, here).flatten() for w, here in zip(many, at, strict=True)]
    assert torch.equal(bits(flat), bits(torch.cat(expected)))
    others = [torch.zeros_like(w) for w in many]
    Strips(dim, others, at).write(flat)
    for w, part, here in zip(others, expected, at, strict=True):
        assert torch.equal(select(w, dim, here).flatten(), part)
        assert w.count_nonzero() == part.count_nonzero()


def test_a_strip_larger_than_a_programs_share_is_copied_whole(launches):
    many = [torch.randn(700, 9), torch.randn(3, 9)]
    at = [torch.tensor([8, 0, 3]), torch.tensor([1, 7])]
    flat = Strips(1, many, at).read()
    expected = [w[:, here].flatten() for w, here in zip(many, at, strict=True)]
    assert torch.equal(flat, torch.cat(expected))


@pytest.mark.parametrize("odd", ["transposed", "buffer", "alone"])
def test_weights_that_a_kernel_cannot_find_go_one_by_one(odd, launches):
    class Other(Tensor):
        pass

    last = {
        "transposed": torch.randn(6, 6).T,
        "buffer": torch.randn(6, 6).as_subclass(Other),
        "alone": torch.randn(6, 6),
    }[odd]
    many = [last] if odd == "alone" else [torch.randn(6, 6), last]
    at = [torch.tensor([4, 1])] * len(many)
    together = Strips(1, many, at)
    expected = [w[:, [4, 1]].flatten() for w in many]
    assert torch.equal(together.read(), torch.cat(expected))
    together.write(together.read().zero_())
    assert all(w[:, [4, 1]].count_nonzero() == 0 for w in many)
    assert launches == []


def test_where_the_kernel_does_not_compile_nothing_but_time_is_lost(launches, monkeypatch):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(sys.modules["sbora_diffusion.core.kernels"], "copy_strips", fails)
    many = weights(torch.float32)
    at = places(1, many)
    expected = torch.cat([w[:, here].flatten() for w, here in zip(many, at, strict=True)])
    assert torch.equal(Strips(1, many, at).read(), expected)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_factors_are_written_again_with_one_launch_in_the_bytes_of_a_fold(variant, scale, launches):
    cases = [case(variant, torch.bfloat16, torch.float32, scale, k) for k in range(4)]
    bases = [weight.clone() for weight, _ in cases]
    rewrites, rewriting = [prepared(*one) for one in cases], Rewriting()
    rewriting.write(rewrites)
    for step in range(3):
        for _, update in cases:
            moved(update.factor, step)
        launches.clear()
        rewriting.write(rewrites)
        assert launches == ["copy_strips"]
        for (weight, update), base in zip(cases, bases, strict=True):
            expected = base.clone()
            fold(expected, [update])
            assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("which", ["fa", "fb"])
def test_layers_of_all_shapes_are_read_and_written_in_one_launch(which, launches, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.core.stacked_merging.AT_ONCE", 1 << 40)
    first, second = library(which)[1:3]
    layers = model(torch.bfloat16)
    folded = FoldedSet(layers)
    assert len(set(SHAPES.values())) > 1
    for pairs in ([(first, 1.0)], [(first, 0.5)], [(second, 1.0), (first, 0.5)], [(second, 1.0)]):
        folded.switch(pairs)
        launches.clear()
        folded.switch([])
        folded.switch(pairs)
        assert launches == ["copy_strips"] * 4
        assert content(layers) == one_by_one(pairs, torch.bfloat16)


def test_an_interrupted_launch_undoes_those_before_it(launches, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.core.stacked_merging.AT_ONCE", 1 << 40)
    first, second = library("fa")[1:3]
    layers = model()
    for name in sorted(layers)[:2]:
        layers[name].bfloat16()
    folded = FoldedSet(layers)
    folded.switch([(first, 1.0)])
    before, real, calls = content(layers), Strips.write, iter(range(2))

    def stops(self, flat):
        real(self, flat)
        if next(calls, None) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Strips, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        folded.switch([(second, 1.0)])
    assert content(layers) == before and next(calls, None) is None


class Recording:
    """Whether `strips.capturing` says so."""

    on = False

    def __call__(self, device: torch.device) -> bool:
        return self.on


@pytest.fixture
def recording(monkeypatch) -> Recording:
    found = Recording()
    monkeypatch.setattr(strips, "capturing", found)
    return found


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32])
def test_columns_are_gathered_by_a_kernel_in_a_recording_alone(half, launches, recording):
    x, at = torch.randn(2, 600, 11).half(), torch.tensor([10, 3, 4])
    x = x.to(half) if half != torch.float32 else x
    expected = x[..., at].to(half)
    assert torch.equal(gathered(x, at, half), expected)
    launches.clear()
    assert torch.equal(gathered(x, at, half), expected) and launches == []
    recording.on = True
    assert torch.equal(gathered(x, at, half), expected) and launches == ["gather_columns"]
    strided = torch.randn(11, 600).to(x.dtype).T
    assert torch.equal(gathered(strided, at, half), strided[:, at].to(half))
    assert gathered(x[:0], at, half).shape == (0, 600, 3)
    assert launches == ["gather_columns"]


def test_a_kernel_that_was_not_tried_before_the_recording_is_not_used(launches, recording):
    recording.on = True
    x, at = torch.randn(600, 11), torch.tensor([10, 3, 4])
    assert torch.equal(gathered(x, at, x.dtype), x[:, at])
    assert torch.equal(Strips(1, [x, x], [at, at]).read(), x[:, at].repeat(2, 1).flatten())
    assert launches == []


@pytest.mark.parametrize("dim", [0, 1])
def test_a_recorded_layer_gathers_once_and_has_the_same_gradients(dim, launches, recording):
    linear, at = nn.Linear(9, 8).requires_grad_(False), torch.tensor([6, 2])
    factor = torch.randn((8, 2) if dim else (2, 9)).requires_grad_()
    x, found = torch.randn(5, 9).requires_grad_(), []
    weights = linear.weight, linear.bias
    for recording.on in (False, True):
        launches.clear()
        y = gradients.Folded.apply(x, factor, *weights, at, 0.5, dim, None)
        found.append(torch.autograd.grad(y.square().sum(), (x, factor)))
    assert launches == ["gather_columns"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
