"""Low-rank updates in training: against PEFT's own LoRA and DoRA, and the shared basis."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sbora_diffusion.diffusion.baselines.low_rank import (
    LowRankTraining,
    MagnitudeTraining,
    basis,
    row_norms,
)
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson
from tests.diffusion.helpers import assert_untouched, snapshot

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts"))
lora = importlib.import_module("pair_study.lora")

QUICK = TrainConfig(
    rank=4, steps=3, batch_size=2, copies=1, resolution=32, warmup_steps=1, seed=3,
    rate_unet=0.02, rate_text_encoder=0.02, rate_tokens=0.01, preservation=0.0, vectors=4,
)  # fmt: skip
SLOTS = (3, 0)


def lessons(thin, subjects):
    pairs = zip(subjects, SLOTS, strict=True)
    return [Lesson(thin, subject, QUICK, slot * QUICK.rank) for subject, slot in pairs]


def trained(thin, subjects, down):
    """Two concepts, and the down factors that they started from."""
    training = LowRankTraining(thin, lessons(thin, subjects), down=down)
    start = {name: parts["down"].detach().clone() for name, parts in training.parts.items()}
    try:
        list(training.steps())
        return training.adapted(), start
    finally:
        training.close()


@pytest.fixture(scope="module")
def of_lora(thin, subjects):
    """Trained with an Adam in which entries of nearly no gradient follow no rounding's sign."""
    before = snapshot(thin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
        yield trained(thin, subjects, "trained")
    assert_untouched(thin, before)


@pytest.mark.parametrize("number", [0, 1])
def test_a_lora_in_a_group_learns_what_pefts_lora_learns_alone(
    thin, subjects, of_lora, number, monkeypatch
):
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
    concepts, start = of_lora
    oracle = lora.LoraTraining(thin, subjects[number], QUICK, start=0)
    try:
        for name, layer in oracle.adapted.items():
            (factor,) = layer.lora_A.values()
            factor.weight.data.copy_(start[name][number])
        list(oracle.steps())
        expected = oracle.lora()
    finally:
        oracle.close()
    concept = concepts[number]
    assert concept.meta.token == subjects[number].settings.token
    assert close(concept.vectors, expected.vectors)
    for place, part in enumerate(("down", "up")):
        names = sorted(expected.factors)
        got = torch.cat([concept.layers[name][part].flatten() for name in names])
        known = torch.cat([expected.factors[name][place].flatten() for name in names])
        assert close(got, known)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-3 * expected.norm() > 0)


def test_both_factors_of_a_lora_move_and_no_two_concepts_start_alike(of_lora):
    concepts, start = of_lora
    for name, down in start.items():
        assert not torch.equal(down[0], down[1])
        for k, concept in enumerate(concepts):
            assert not torch.equal(concept.layers[name]["down"], down[k])
            assert concept.layers[name]["up"].any()


def test_frozen_down_factors_stay_where_they_started(thin, subjects):
    concepts, start = trained(thin, subjects, "frozen")
    for name, down in start.items():
        assert not torch.equal(down[0], down[1])
        for k, concept in enumerate(concepts):
            assert torch.equal(concept.layers[name]["down"], down[k])
            assert concept.layers[name]["up"].any()


def test_rows_pass_through_the_weight_of_their_own_concept_in_training_alone(thin, subjects):
    training = LowRankTraining(thin, lessons(thin, subjects))
    generator = torch.Generator().manual_seed(0)
    try:
        name, parts = next(iter(training.parts.items()))
        layer, up = training.lessons[0].layers[name], parts["up"]
        up.data.copy_(torch.randn(up.shape, generator=generator))
        x = torch.randn(4, 5, layer.in_features, generator=generator)
        training._train_mode(True)
        got = layer(x)
        training._train_mode(False)
        for row, concept in enumerate((0, 0, 1, 1)):
            weight = layer.weight + up[concept] @ parts["down"][concept]
            expected = nn.functional.linear(x[row], weight, layer.bias)
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    finally:
        training.close()


def test_orthogonal_down_factors_stay_and_no_two_concepts_meet(thin, subjects):
    (one, other), start = trained(thin, subjects, "basis")
    for name, down in start.items():
        pair = one.layers[name]["down"], other.layers[name]["down"]
        assert torch.equal(pair[0], down[0]) and torch.equal(pair[1], down[1])
        assert one.layers[name]["up"].any() and other.layers[name]["up"].any()
        torch.testing.assert_close(pair[0] @ pair[0].T, torch.eye(4), rtol=0, atol=1e-5)
        assert (pair[0] @ pair[1].T).abs().max() < 1e-5


def test_the_basis_is_orthogonal_and_follows_layer_and_seed_alone():
    one = basis("unet.a", 160, 0)
    torch.testing.assert_close(one @ one.T, torch.eye(160), rtol=0, atol=1e-5)
    assert torch.equal(one, basis("unet.a", 160, 0))
    assert not torch.equal(one, basis("unet.a", 160, 1))
    assert not torch.equal(one, basis("unet.b", 160, 0))


@pytest.mark.parametrize("layer_name", ["self_attn.q_proj", "attn2.to_k"])  # with and without bias
def test_dora_gives_and_learns_what_pefts_dora_does(thin, subjects, layer_name):
    training = MagnitudeTraining(thin, lessons(thin, subjects), "dora")
    generator = torch.Generator().manual_seed(0)
    try:
        name = next(name for name in training.parts if name.endswith(layer_name))
        layer, parts = training.lessons[0].layers[name], training.parts[name]
        for part in parts.values():
            part.data += 0.3 * torch.randn(part.shape, generator=generator)
        x = torch.randn(4, 5, layer.in_features, generator=generator)
        training._train_mode(True)
        got = layer(x)
        got.square().sum().backward()
        training._train_mode(False)
        for concept in (0, 1):
            oracle = dora_oracle(layer, {part: t[concept] for part, t in parts.items()})
            expected = oracle(x[2 * concept : 2 * concept + 2])
            torch.testing.assert_close(
                got[2 * concept : 2 * concept + 2], expected, rtol=1e-4, atol=1e-4
            )
            expected.square().sum().backward()
            found = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
            assert len(found) == 3
            for part, known in (("down", "lora_A"), ("up", "lora_B"), ("magnitude", "magnitude")):
                (grad,) = (g for n, g in found.items() if known in n)
                assert close(parts[part].grad[concept], grad)
    finally:
        training.close()


def dora_oracle(layer, parts):
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
    model[0].load_state_dict(layer.state_dict())
    rank = len(parts["down"])
    config = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=["0"])
    wrapped = get_peft_model(model, config)
    own = wrapped.base_model.model[0]
    own.lora_A["default"].weight.data.copy_(parts["down"])
    own.lora_B["default"].weight.data.copy_(parts["up"])
    own.lora_magnitude_vector["default"].weight.data.copy_(parts["magnitude"])
    return wrapped


def test_row_norms_are_those_of_the_sums():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator)
    down, up = torch.randn(3, 2, 5, generator=generator), torch.randn(3, 7, 2, generator=generator)
    expected = torch.stack([(weight + up[k] @ down[k]).norm(dim=1) for k in range(3)])
    torch.testing.assert_close(row_norms(weight, down, up), expected)
