"""Folding against a dense oracle; bytes, not tolerances."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConflictError, FormatError, NonFiniteError
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.merging import fold, refold, restore
from sbora_diffusion.core.updates import Update

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(weight: Tensor) -> Tensor:
    return weight.detach().clone().view(BITS[weight.dtype])


def oracle(weight: Tensor, updates: list[Update]) -> Tensor:
    """cast(fp32(W0) + Σ ΔW), dense, in key order; untouched entries as they were."""
    total, touched = torch.zeros(weight.shape), torch.zeros(weight.shape, dtype=torch.bool)
    for u in sorted(updates, key=lambda u: u.key):
        total += delta_weight(u.variant, u.factor, u.indices, tuple(weight.shape), u.scale)
        touched.index_fill_(1 if u.variant == "fa" else 0, u.indices.long(), True)
    return torch.where(touched, (weight.float() + total).to(weight.dtype), weight)


def update(key: str, variant: str, indices: list[int], shape: tuple[int, int], seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    out, inp = shape
    size = (out, len(indices)) if variant == "fa" else (len(indices), inp)
    factor = torch.randn(size, generator=g)
    return Update(key, variant, torch.tensor(indices, dtype=torch.int32), factor, 0.3)


@st.composite
def problems(draw) -> tuple[Tensor, list[Update]]:
    """A weight and up to five updates, FA and FB, overlapping or not."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g).to(draw(st.sampled_from(DTYPES)))
    updates = []
    for n in range(draw(st.integers(0, 5))):
        variant = draw(st.sampled_from(["fa", "fb"]))
        width = shape[1] if variant == "fa" else shape[0]
        indices = draw(st.lists(st.integers(0, width - 1), min_size=1, unique=True))
        updates.append(update(f"key{n}", variant, indices, shape, seed + n))
    return weight, updates


def mixture() -> tuple[Tensor, list[Update]]:
    shape = (12, 10)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plan = [("fa", [0, 7]), ("fb", [3, 11]), ("fa", [2, 9]), ("fb", [0, 5])]
    return weight, [update(f"k{n}", v, i, shape, n) for n, (v, i) in enumerate(plan)]


@settings(deadline=None, max_examples=150)
@given(problems(), st.randoms(use_true_random=False))
def test_folding_equals_the_dense_oracle_in_any_order(problem, random):
    weight, updates = problem
    expected = bits(oracle(weight, updates))
    random.shuffle(updates)
    folded = weight.clone()
    fold(folded, updates)
    assert torch.equal(bits(folded), expected)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_restoring_gives_the_base_bytes(problem):
    weight, updates = problem
    folded = weight.clone()
    restore(folded, fold(folded, updates))
    assert torch.equal(bits(folded), bits(weight))


@settings(deadline=None, max_examples=100)
@given(problems(), st.data())
def test_removing_concepts_equals_merging_the_others(problem, data):
    weight, updates = problem
    keep = data.draw(st.lists(st.sampled_from(updates), unique=True)) if updates else []
    folded = weight.clone()
    refold(folded, fold(folded, updates), keep)
    assert torch.equal(bits(folded), bits(oracle(weight, keep)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_permutation_of_a_mixture_of_variants_gives_the_same_bytes(dtype):
    base, updates = mixture()
    weight = base.to(dtype)
    expected = bits(oracle(weight, updates))
    for order in itertools.permutations(updates):
        folded = weight.clone()
        fold(folded, order)
        assert torch.equal(bits(folded), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_one_by_one_equals_merging_at_once(dtype):
    base, updates = mixture()
    weight = base.to(dtype)
    folded = weight.clone()
    originals = fold(folded, updates[3:])
    for start in (2, 1, 0):
        originals = refold(folded, originals, updates[start:])
    assert torch.equal(bits(folded), bits(oracle(weight, updates)))


def test_a_naive_sequential_merge_of_this_mixture_does_depend_on_the_order():
    """The tests above could not fail if the example had no order-dependent entries."""
    weight, updates = mixture()
    results = set()
    for order in itertools.permutations(updates):
        w = weight.bfloat16()
        for u in order:
            w = w + delta_weight(u.variant, u.factor, u.indices, (12, 10), u.scale).bfloat16()
        results.add(w.float().numpy().tobytes())
    assert len(results) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_entries_keep_their_bits_even_negative_zeros_and_infinities(dtype):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
    weight[0, 1], weight[1, 1], weight[2, 1] = -0.0, torch.inf, torch.nan
    before = bits(weight)
    fold(weight, [update("a", "fa", [4, 5], (8, 8), 0), update("b", "fb", [7], (8, 8), 1)])
    changed = bits(weight) != before
    allowed = torch.zeros(8, 8, dtype=torch.bool)
    allowed[:, [4, 5]], allowed[7] = True, True
    assert changed.any()
    assert not (changed & ~allowed).any()


def test_half_precision_is_rounded_once_from_fp32():
    """256 + 0.75 + 0.75 is 258 in bf16 if summed in fp32, 256 if each sum is rounded."""
    weight = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    one = torch.ones(1, 1)
    index = torch.tensor([0])
    fold(weight, [Update("a", "fa", index, one, 0.75), Update("b", "fb", index, one, 0.75)])
    assert weight.item() == 258.0


def test_the_parameter_object_and_its_storage_stay():
    layer = nn.Linear(4, 4, bias=False)
    parameter, pointer = layer.weight, layer.weight.data_ptr()
    originals = fold(layer.weight, [update("a", "fa", [1], (4, 4), 0)])
    assert layer.weight is parameter
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.requires_grad
    assert not originals.blocks["a"].requires_grad


def test_a_weight_cast_after_folding_is_restored_to_the_cast_base():
    weight, updates = mixture()
    folded = weight.clone()
    originals = fold(folded, updates)
    half = folded.bfloat16()
    restore(half, originals)
    assert torch.equal(bits(half), bits(weight.bfloat16()))


def test_a_non_contiguous_weight_is_folded_in_place():
    storage = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    expected = oracle(storage.T, [update("a", "fb", [1], (4, 6), 0)])
    fold(storage.T, [update("a", "fb", [1], (4, 6), 0)])
    assert torch.equal(storage.T, expected)


def test_a_non_finite_factor_is_refused_by_name_and_nothing_is_written():
    weight, updates = mixture()
    before = bits(weight)
    updates[2].factor[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="'k2'"):
        fold(weight, updates)
    assert torch.equal(bits(weight), before)


def test_overflow_in_fp16_names_the_concept_that_overflows_and_keeps_the_folded_set():
    weight, updates = mixture()
    weight = weight.half()
    originals = fold(weight, updates[:1])
    before = bits(weight)
    loud = Update("loud", "fa", torch.tensor([4]), torch.full((12, 1), 1e6), 1.0)
    with pytest.raises(NonFiniteError, match="concept 'loud'"):
        refold(weight, originals, [updates[0], loud])
    assert torch.equal(bits(weight), before)


def test_one_key_twice_is_refused():
    weight, updates = mixture()
    with pytest.raises(ConflictError, match="'k0' is given twice"):
        fold(weight, [updates[0], updates[1], updates[0]])


@pytest.mark.parametrize(
    ("variant", "indices", "size"),
    [
        ("fa", [0, 1], (8, 3)),
        ("fa", [0, 1], (2, 8)),
        ("fb", [0, 1], (2, 7)),
        ("fa", [0, 10], (8, 2)),
        ("fa", [0, -1], (8, 2)),
        ("fb", [3, 3], (2, 9)),
    ],
)
def test_factors_and_indices_that_do_not_fit_are_refused(variant, indices, size):
    bad = Update("bad", variant, torch.tensor(indices), torch.ones(size), 1.0)
    weight = torch.zeros(8, 9)
    with pytest.raises(FormatError, match="'bad'"):
        fold(weight, [bad])
    assert not weight.any()


def test_an_integer_weight_is_refused():
    with pytest.raises(FormatError, match="floating-point"):
        fold(torch.zeros(4, 4, dtype=torch.uint8), [])
