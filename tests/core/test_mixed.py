"""Each row with its own concept gives what the single-concept maps give row by row."""

import pytest
import torch
from torch import Tensor, nn

from sbora_diffusion.core.functional import SBORA
from sbora_diffusion.core.mixed import Bank, sbora_rows, stacked
from sbora_diffusion.core.updates import Update
from tests.core.tuner_models import VARIANTS

OUT, IN = 7, 9


def updates(variant: str, *ranks: int, dtype=torch.float32) -> list[Update]:
    """Updates with random indices (they may overlap), factors and scales."""
    g, made = torch.Generator().manual_seed(0), []
    for key, rank in enumerate(ranks):
        indices = torch.randperm(IN if variant == "fa" else OUT, generator=g)[:rank].int()
        shape = (OUT, rank) if variant == "fa" else (rank, IN)
        factor = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        made.append(Update(str(key), variant, indices, factor, 0.5 + key))
    return made


def batch(*shape: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, IN, generator=g, dtype=torch.float64)
    return torch.randn(*shape, OUT, generator=g, dtype=torch.float64).to(dtype), x.to(dtype)


def bank_of(variant: str, groups, like: Tensor) -> Bank:
    return stacked(variant, groups, (OUT, IN), like)


def row_by_row(y: Tensor, x: Tensor, known: list[Update], rows: list[int]) -> Tensor:
    """The oracle: one call of the single-concept map for each row that has a concept."""
    results = []
    for row, chosen in enumerate(rows):
        single = y[row]
        if chosen >= 0:
            u = known[chosen]
            single = SBORA[u.variant](single, x[row], u.factor, u.indices, u.scale)
        results.append(single)
    return torch.stack(results)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2)], ids=str)
def test_rows_with_mixed_ranks_repeated_concepts_and_none_equal_the_loop(variant, shape):
    known, rows = updates(variant, 4, 1, 3), [2, 0, -1, 0, 1, -1]
    y, x = batch(*shape)
    before = y.clone()
    bank = bank_of(variant, [[u] for u in known], x).select(torch.tensor(rows))
    got = sbora_rows(y, x, bank)
    torch.testing.assert_close(got, row_by_row(y, x, known, rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, before) and torch.equal(got[2], y[2]) and not torch.equal(got[0], y[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_rows_without_concepts_is_left_as_it_is(variant):
    y, x = batch(3, 2)
    bank = bank_of(variant, [[], [], []], x)
    assert torch.equal(sbora_rows(y, x, bank), y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_halves_of_a_doubled_batch_have_the_same_concepts(variant):
    known, rows = updates(variant, 2, 4), [1, -1, 0]
    (y, x) = batch(6, 4)
    bank = bank_of(variant, [[u] for u in known], x).select(torch.tensor(rows * 2))
    expected = row_by_row(y, x, known, rows * 2)
    torch.testing.assert_close(sbora_rows(y, x, bank), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_consecutive_rows_share_an_entry_and_a_group_of_updates_is_summed(variant):
    known = updates(variant, 4, 2, 3)  # which overlap
    y, x = batch(4, 3)
    bank = bank_of(variant, [[known[0], known[1]], [known[2]]], x)
    expected = row_by_row(y, x, known, [0, 0, 2, 2])
    expected = row_by_row(expected, x, known, [1, 1, -1, -1])
    torch.testing.assert_close(sbora_rows(y, x, bank), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [None, [1, -1, 1, 0]], ids=["aligned", "selected"])
def test_gradients_are_right_in_float64(variant, rows):
    y, x = batch(4, 2, dtype=torch.float64)
    bank = bank_of(variant, [[u] for u in updates(variant, 3, 2, dtype=torch.float64)], x)

    def output(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        made = Bank(variant, factor, bank.indices, bank.scale)
        return sbora_rows(y, x, made if rows is None else made.select(torch.tensor(rows)))

    inputs = [tensor.requires_grad_() for tensor in (y, x, bank.factor)]
    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_goes_to_the_rows_own_concept_and_never_to_the_padding(variant):
    known = updates(variant, 4, 2)
    y, x = batch(2, 3)
    bank = bank_of(variant, [[u] for u in known], x)
    bank.factor.requires_grad_()
    sbora_rows(y, x, bank)[1].square().sum().backward()
    grad = bank.factor.grad
    width = 2 if variant == "fa" else 1
    assert not grad[0].any() and not grad[1].narrow(width - 1, 2, 2).any()
    single = nn.Parameter(known[1].factor.clone())
    SBORA[variant](y[1], x[1], single, known[1].indices, known[1].scale).square().sum().backward()
    torch.testing.assert_close(grad[1].narrow(width - 1, 0, 2), single.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_half_precision_a_row_is_what_the_single_map_gives(variant):
    known, rows = updates(variant, 3, 4), [1, 0]
    y, x = batch(2, 5, dtype=torch.bfloat16)
    bank = bank_of(variant, [[u] for u in known], x).select(torch.tensor(rows))
    got, expected = sbora_rows(y, x, bank), row_by_row(y, x, known, rows)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_the_single_map_keeps_is_kept_for_the_backward_pass(variant):
    y, x = batch(2, 50)
    bank = bank_of(variant, [[u] for u in updates(variant, 2, 2)], x)
    kept: list[int] = []
    factor = bank.factor.requires_grad_()
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel() if t.data_ptr() != x.data_ptr() else 0), t)[1], lambda t: t
    )
    with keep:
        sbora_rows(y, x.requires_grad_(), Bank(variant, factor, bank.indices, bank.scale))
    columns = 2 * 50 * 2 if variant == "fa" else 0  # FB keeps x itself, which costs nothing here
    assert sum(kept) == columns + factor.numel() + bank.scale.numel() + bank.indices.numel()
