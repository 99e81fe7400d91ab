"""Writing a factor again after each step: the bytes of a fresh fold, and what it costs."""

import pytest
import torch
from torch import Tensor, nn

from sbora_diffusion.core import gradients
from sbora_diffusion.core.merging import fold
from sbora_diffusion.core.rewriting import Rewrite, Rewriting
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from sbora_diffusion.core.tuner.folded_training import folded_training
from sbora_diffusion.core.updates import Update
from tests.core.test_stacked_merging import Counted
from tests.core.tuner_models import HALVES, VARIANTS

OUT, IN, RANK = 6, 7, 3
TYPES = [torch.float32, torch.float64, *HALVES]


def case(variant: str, weight_type, factor_type, scale: float, seed: int) -> tuple[Tensor, Update]:
    """A base weight with zeros of both signs, and an update of the same kind."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=g).to(weight_type)
    weight[::2, ::2], weight[1::2, 1::2] = -0.0, 0.0
    width = IN if variant == "fa" else OUT
    indices = torch.randperm(width, generator=g)[:RANK]
    shape = (OUT, RANK) if variant == "fa" else (RANK, IN)
    factor = torch.randn(shape, generator=g).to(factor_type)
    return weight, Update("k", variant, indices, factor, scale)


def moved(factor: Tensor, step: int) -> None:
    """What an optimizer does, and zeros of both signs."""
    factor.mul_(-1.7)
    factor[0, :] = 0.0 if step % 2 else -0.0


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def prepared(weight: Tensor, update: Update) -> Rewrite:
    return Rewrite(weight, update, fold(weight, [update]).blocks["k"])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_layers_of_all_types_get_the_bytes_of_a_fresh_fold_at_every_step(scale):
    kinds = [(v, w, f) for v in VARIANTS for w in TYPES for f in TYPES]
    cases = [case(*kind, scale, seed) for seed, kind in enumerate(kinds * 2)]
    bases = [weight.clone() for weight, _ in cases]
    rewrites = [prepared(*one) for one in cases]
    rewriting = Rewriting()
    for step in range(4):
        for _, update in cases:
            moved(update.factor, step)
        rewriting.write(rewrites)
        for (weight, update), base in zip(cases, bases, strict=True):
            expected = base.clone()
            fold(expected, [update])
            assert torch.equal(bits(weight), bits(expected)), (update, weight.dtype)


@pytest.mark.parametrize("scales", [[1.0, 0.3], [0.3, 0.3]])
def test_scales_may_differ_from_layer_to_layer(scales):
    cases = [case("fa", torch.bfloat16, torch.float32, s, k) for k, s in enumerate(scales)]
    bases = [weight.clone() for weight, _ in cases]
    rewrites = [prepared(*one) for one in cases]
    for _, update in cases:
        moved(update.factor, 0)
    Rewriting().write(rewrites)
    for (weight, update), base in zip(cases, bases, strict=True):
        fold(base, [update])
        assert torch.equal(bits(weight), bits(base))


def test_writing_nothing_is_no_error():
    Rewriting().write([])


def test_what_is_prepared_serves_the_same_layers_alone():
    cases = [case("fa", torch.bfloat16, torch.float32, 1.0, k) for k in range(3)]
    bases = [weight.clone() for weight, _ in cases]
    first, second, third = (prepared(*one) for one in cases)
    rewriting = Rewriting()
    lists = [first, second], [second, first], [third], [first, second, third], [first]
    for step, some in enumerate(lists):
        for _, update in cases:
            moved(update.factor, step)
        rewriting.write(some)
        for one, base in zip((first, second, third), bases, strict=True):
            expected = base.clone()
            fold(expected, [one.update])
            assert torch.equal(bits(one.weight), bits(expected)) == (one in some)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_write_prepares_nothing(variant):
    cases = [case(variant, torch.bfloat16, torch.float32, 1.0, k) for k in range(3)]
    rewrites, rewriting = [prepared(*one) for one in cases], Rewriting()
    found = []
    for _ in range(3):
        with Counted() as counted:
            rewriting.write(rewrites)
        found.append(counted.found)
    assert found[0].total() > found[1].total() and found[1] == found[2]
    assert not any("empty" in name or "cat" in name for name in found[2])


def step_operations(count: int, variant: str, alpha: float) -> Counted:
    """Of forward pass, backward pass and write of so many layers in a row."""
    layers = {}
    for k in range(count):
        base = nn.Linear(16, 16, bias=False).bfloat16().requires_grad_(False)
        config = SboraConfig(r=4, alpha=alpha, variant=variant)
        layers[f"{k}"] = SboraLinear(base, "a", config, f"unet.{k}")
    with folded_training(layers, "a") as training:
        x = torch.randn(8, 16, dtype=torch.bfloat16).requires_grad_()
        with Counted() as counted:
            nn.Sequential(*layers.values())(x).backward(torch.ones_like(x))
            training.write_back()
    return counted


@pytest.mark.parametrize(("alpha", "scaled"), [(4, 0), (8, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_costs_a_gather_its_gradient_and_one_write(variant, alpha, scaled):
    few, many = (step_operations(count, variant, alpha).found for count in (2, 6))
    each = {name: (many[name] - few[name]) / 4 for name in many if many[name] != few[name]}
    names = ("index_select", "mm", "_to_copy", "mul", "add_", "index_copy_")
    # The frozen layer has two products of its own; the cast is that of the product to fp32.
    expected = dict(zip(names, (1, 3, 1, scaled, 0, 1), strict=True))
    assert {name: each.get(f"aten.{name}", 0) for name in names} == expected
    lists = {name: many[name] for name in many if "_foreach" in name}
    # One of them prepares the first write.
    assert sum(lists.values()) == 2 + scaled


def widened(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What `torch.mm` does on a GPU alone."""
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("n", "m"), [(3, 40), (40, 3)])
def test_where_a_product_can_be_fp32_the_gradient_is_not_rounded_to_a_half(n, m, half, monkeypatch):
    monkeypatch.setattr(gradients, "_widens", lambda _: True)
    monkeypatch.setattr(torch, "mm", widened)
    g = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(2, 50, width, generator=g).to(half) for width in (n, m))
    found = gradients.factor_gradient(grad, x, 0.5, half, torch.float32)
    exact = 0.5 * torch.einsum("bti,btj->ij", grad.double(), x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("tokens", [0, 50])
def test_on_a_gpu_the_gradient_of_halves_is_the_fp32_one(tokens, half):
    grad, x = (torch.randn(tokens, width, device="cuda").to(half) for width in (40, 3))
    found = gradients.factor_gradient(grad, x, 1.0, half, torch.float32)
    torch.testing.assert_close(found, grad.float().T @ x.float(), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous()
