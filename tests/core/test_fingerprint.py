import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.core.fingerprint import LAYER_DIGITS, compare, fingerprint, layer_digest


def make_base(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(6, 5, generator=generator)
        for name in ("unet.attn1.to_q", "unet.attn2.to_k", "text_encoder.q_proj")
    }


def taken(base: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, str]:
    return fingerprint((name, weight.to(dtype or weight.dtype)) for name, weight in base.items())


def flipped(weight: torch.Tensor, position: int, bit: int) -> torch.Tensor:
    ints = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    copy = weight.clone()
    flat = copy.view(ints).view(-1)
    flat[position] ^= torch.tensor(1, dtype=ints) << bit
    return copy


def test_digest_is_sha256_of_shape_and_little_endian_fp32_values():
    weight = torch.tensor([[1.0, -2.5]])
    expected = hashlib.sha256(b"1,2;" + struct.pack("<2f", 1.0, -2.5)).hexdigest()[:16]
    assert layer_digest(weight) == expected * 3  # both are exact in fp16 and bf16
    assert len(layer_digest(torch.tensor([[0.1]]))) == LAYER_DIGITS


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wider", [torch.float32, torch.float64])
def test_the_same_values_stored_wider_are_the_same_base(stored, wider):
    base = {name: weight.to(stored) for name, weight in make_base().items()}
    assert compare(taken(base), taken(base, wider)) == "same"
    assert compare(taken(base, wider), taken(base)) == "same"


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, torch.float32])
def test_a_rounded_copy_is_recognised_in_both_directions(narrow, stored):
    base = make_base()
    copy = {name: weight.to(narrow).to(stored or narrow) for name, weight in base.items()}
    assert compare(taken(base), taken(copy)) == "rounded"
    assert compare(taken(copy), taken(base)) == "rounded"


def test_one_rounded_layer_makes_the_whole_base_rounded():
    base = make_base()
    copy = base | {"unet.attn2.to_k": base["unet.attn2.to_k"].half()}
    assert compare(taken(base), taken(copy)) == "rounded"


def test_a_half_precision_copy_is_not_its_bfloat16_sibling():
    base = make_base()
    with pytest.raises(BaseMismatch):
        compare(taken(base, torch.float16), taken(base, torch.bfloat16))


def test_models_that_merely_round_to_the_same_numbers_are_different_bases():
    base = make_base()
    nearby = base | {"unet.attn1.to_q": flipped(base["unet.attn1.to_q"], 3, 0)}
    assert torch.equal(base["unet.attn1.to_q"].half(), nearby["unet.attn1.to_q"].half())
    with pytest.raises(BaseMismatch, match=r"1 of 3 adapted layers are different.*attn1\.to_q"):
        compare(taken(base), taken(nearby))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 29),
    st.integers(0, 31),
)
def test_one_changed_bit_is_another_base(dtype, position, bit):
    base = {name: weight.to(dtype) for name, weight in make_base().items()}
    name = "unet.attn2.to_k"
    changed = base | {name: flipped(base[name], position, bit % (8 * base[name].element_size()))}
    for one, other in ((base, changed), (changed, base)):
        with pytest.raises(BaseMismatch, match=name):
            compare(taken(one), taken(other))


def test_values_beyond_half_precision_still_recognise_the_rounded_copy():
    base = {"unet.a": torch.tensor([[7e4, 1e-9, -0.0, 3.0]])}
    copy = {"unet.a": base["unet.a"].half()}
    assert copy["unet.a"].isinf().any()
    assert compare(taken(base), taken(copy)) == "rounded"


def test_shape_and_sign_of_zero_are_part_of_the_values():
    weight = torch.arange(6.0).reshape(2, 3)
    assert layer_digest(weight) != layer_digest(weight.reshape(3, 2))
    assert layer_digest(torch.zeros(1)) != layer_digest(-torch.zeros(1))


def test_memory_layout_does_not_matter():
    weight = torch.arange(6.0).reshape(2, 3)
    assert layer_digest(weight) == layer_digest(weight.t().contiguous().t())
    assert layer_digest(weight) == layer_digest(torch.nn.Parameter(weight))


def test_missing_layers_are_counted_and_the_first_is_named():
    concept, base = taken(make_base()), taken(make_base())
    del base["unet.attn1.to_q"], base["unet.attn2.to_k"]
    with pytest.raises(BaseMismatch, match=r"2 of 3 adapted layers are missing.*unet\.attn1\.to_q"):
        compare(concept, base)


def test_layers_that_the_concept_does_not_adapt_do_not_matter():
    concept, base = taken(make_base()), taken(make_base())
    del concept["unet.attn1.to_q"]
    assert compare(concept, base) == "same"
