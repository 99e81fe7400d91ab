import math

import pytest
import torch

from sbora_diffusion.core.crosstalk import UpdateEnergy, from_norms
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.updates import Update

OUT, IN, RANK = 12, 20, 4


def update(variant: str, seed: int = 0, scale: float = 0.7, dtype=torch.float32) -> Update:
    generator = torch.Generator().manual_seed(seed)
    width = IN if variant == "fa" else OUT
    shape = (OUT, RANK) if variant == "fa" else (RANK, IN)
    indices = torch.randperm(width, generator=generator)[:RANK].sort().values.to(torch.int32)
    return Update(
        f"u{seed}", variant, indices, torch.randn(shape, generator=generator).to(dtype), scale
    )


def dense_norm(found: Update, x: torch.Tensor) -> float:
    """‖ΔW X‖ with ΔW written out, in fp64."""
    delta = delta_weight(
        found.variant, found.factor.double(), found.indices, (OUT, IN), found.scale
    )
    return (x.double().reshape(-1, IN) @ delta.T).norm().item()


def activations(*shape: int, seed: int = 9) -> torch.Tensor:
    """With one coordinate far louder than the rest, as outlier channels are."""
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed))
    x[..., 3] += 50
    return x


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_equal_those_of_the_dense_update_on_all_activations_together(variant, dtype):
    found = update(variant, dtype=dtype)
    portions = [activations(2, 7), activations(5, seed=1), activations(1, 3, 2, seed=2)]
    energy = UpdateEnergy(found)
    for x in portions:
        energy.add(x)
    everything = torch.cat([x.reshape(-1, IN) for x in portions])
    assert energy.norm() == pytest.approx(dense_norm(found, everything), rel=1e-5)


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_half_precision_activations_and_negative_scales_are_measured_too(variant):
    found = update(variant, scale=-2.0)
    x = activations(6).to(torch.bfloat16)
    energy = UpdateEnergy(found)
    energy.add(x)
    assert energy.norm() == pytest.approx(dense_norm(found, x.float()), rel=1e-5)


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_nothing_seen_or_nothing_learned_is_silence(variant):
    assert UpdateEnergy(update(variant)).norm() == 0
    energy = UpdateEnergy(update(variant, scale=0.0))
    energy.add(activations(4))
    assert energy.norm() == 0


def test_an_fa_update_is_silent_where_its_coordinates_are_zero():
    found = update("fa")
    x = activations(5)
    x[:, found.indices.long()] = 0
    energy = UpdateEnergy(found)
    energy.add(x)
    assert energy.norm() == 0


@pytest.fixture
def measured():
    """Two concepts that share layers a and b; only the first adapts c, only the second d."""
    first = {(0, "a"): 2.0, (0, "b"): 4.0, (0, "c"): 1.0, (1, "a"): 1.0, (1, "b"): 8.0, (1, "d"): 3}
    second = {
        (0, "a"): 3.0,
        (0, "b"): 0.0,
        (0, "c"): 9.0,
        (1, "a"): 6.0,
        (1, "b"): 5.0,
        (1, "d"): 1,
    }
    return from_norms(["dog", "cat"], [first, second])


def test_ratios_are_held_against_the_concept_whose_prompts_they_are(measured):
    ratios = dict(zip(measured.layers, measured.ratios().permute(2, 0, 1).tolist(), strict=True))
    assert ratios["a"] == [[1, 0.5], [0.5, 1]]
    assert ratios["b"] == [[1, 2], [0, 1]]
    assert math.isnan(ratios["c"][0][1]) and math.isnan(ratios["c"][1][0])
    assert math.isnan(ratios["d"][0][1]) and math.isnan(ratios["d"][1][0])


def test_rms_and_worst_count_shared_layers_alone(measured):
    assert measured.rms().tolist() == [
        [1, pytest.approx(math.sqrt((0.25 + 4) / 2))],
        [pytest.approx(math.sqrt(0.25 / 2)), 1],
    ]
    assert measured.worst(0, 1) == ("b", 2.0)
    assert measured.worst(1, 0) == ("a", 0.5)


def test_groups_are_named_in_order_and_have_their_own_rms(measured):
    groups = measured.grouped(lambda layer: "vowel" if layer == "a" else "consonant")
    assert list(groups) == ["consonant", "vowel"]
    assert groups["vowel"].tolist() == [[1, 0.5], [0.5, 1]]
    assert groups["consonant"][0, 1] == 2


def test_concepts_without_a_shared_layer_have_no_ratio():
    apart = from_norms(["a", "b"], [{(0, "x"): 1.0, (1, "y"): 1.0}, {(0, "x"): 1.0, (1, "y"): 1.0}])
    assert apart.rms().isnan().tolist() == [[False, True], [True, False]]
    assert apart.worst(0, 1) is None


def test_a_concept_that_is_silent_on_its_own_prompts_gives_no_ratio():
    silent = from_norms(
        ["a", "b"], [{(0, "x"): 0.0, (1, "x"): 1.0}, {(0, "x"): 0.0, (1, "x"): 1.0}]
    )
    assert silent.rms().isnan().tolist() == [[True, True], [False, False]]
