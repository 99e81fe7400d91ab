"""Ratios, groups and gaps of measured norms; how these come about is tested with predictions."""

import math

import pytest

from sbora_diffusion.core.crosstalk import from_norms


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
