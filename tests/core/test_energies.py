"""Energies of sums of updates against dense ones."""

import pytest
import torch

from sbora_diffusion.core.energies import UpdateSum, weight_energies
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.updates import Update

OUT, IN = 7, 10
KINDS = {
    "none": [],
    "FA": [("fa", [1, 4], 1.0), ("fa", [0, 7], -2.0)],
    "FB": [("fb", [1, 4], 1.0), ("fb", [6, 0], 0.5)],
    "mixed": [("fa", [1, 4], 1.0), ("fb", [0, 6], 1.5), ("fa", [9, 8], 0.3), ("fb", [2], 1.0)],
    "shared columns": [("fa", [4, 1], 1.0), ("fa", [4, 5], 0.7)],
    "shared rows": [("fb", [1, 4], 1.0), ("fb", [5, 4], 0.7), ("fa", [3], 1.0)],
    "silent": [("fa", [1, 4], 0.0), ("fb", [1], 0.0)],
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates_of(kind: str, dtype=torch.float64) -> list[Update]:
    found = []
    for k, (variant, indices, scale) in enumerate(KINDS[kind]):
        shape = (OUT, len(indices)) if variant == "fa" else (len(indices), IN)
        factor = random(*shape, seed=k).to(dtype)
        found.append(Update(f"u{k}", variant, torch.tensor(indices), factor, scale))
    return found


def dense(updates: list[Update]) -> torch.Tensor:
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for u in updates:
        total += delta_weight(u.variant, u.factor.double(), u.indices, (OUT, IN), u.scale)
    return total


@pytest.fixture
def inputs() -> torch.Tensor:
    """(tokens, in), with a coordinate far louder than the rest, as outlier channels are."""
    x = random(40, IN, seed=9)
    x[:, 4] += 30
    return x


def mean(values: torch.Tensor) -> float:
    """Of (tokens, out) over the tokens, summed over the outputs."""
    return (values.sum() / len(values)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_energy_is_the_mean_square_of_what_the_dense_sum_makes_of_the_inputs(
    kind, dtype, inputs
):
    updates = updates_of(kind, dtype)
    found = UpdateSum(updates).energy(inputs.T @ inputs / len(inputs))
    expected = mean((inputs @ dense(updates).T).square())
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", [k for k in KINDS if k != "none"])
def test_the_inner_product_with_any_update_is_that_of_dense_outputs(kind, of, inputs):
    together = UpdateSum(updates_of(kind))
    for update in updates_of(of):
        found = together.inner(update, inputs.T @ inputs / len(inputs))
        outputs = (inputs @ dense(updates_of(kind)).T) * (inputs @ dense([update]).T)
        assert found == pytest.approx(mean(outputs), rel=1e-10, abs=1e-9)


def test_the_order_of_the_updates_changes_no_bit(inputs):
    updates = updates_of("mixed")
    moment = inputs.T @ inputs
    one, other = UpdateSum(updates), UpdateSum(updates[::-1])
    assert one.energy(moment) == other.energy(moment)
    assert one.inner(updates[1], moment) == other.inner(updates[1], moment)


def test_an_fa_update_is_silent_where_its_coordinates_are_zero(inputs):
    updates = updates_of("FA")
    inputs[:, [0, 1, 4, 7]] = 0
    assert UpdateSum(updates).energy(inputs.T @ inputs) == 0


def test_energies_of_a_whole_weight_are_those_of_its_outputs(inputs):
    weight, other = random(OUT, IN, seed=3).float(), random(5, IN, seed=4)
    found = weight_energies(weight, [x.T @ x / len(x) for x in (inputs, other)])
    expected = [mean((x @ weight.double().T).square()) for x in (inputs, other)]
    assert found == pytest.approx(expected, rel=1e-12)
