"""The study of how many concepts a model bears: subjects, dense peers and their merge."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
lora = importlib.import_module("pair_study.lora")
measures = importlib.import_module("number_study.measures")
peers = importlib.import_module("number_study.peers")
plan = importlib.import_module("number_study.plan")

NAMES = ("toytrain", "baseballcap")  # not in the order of their tokens
QUICK = TrainConfig(
    rank=4, steps=3, batch_size=2, copies=1, resolution=32, warmup_steps=1, seed=3,
    rate_unet=0.02, rate_text_encoder=0.02,
)  # fmt: skip
SLOTS = {"toytrain": 3, "baseballcap": 0}


def lessons(pocket, config=QUICK):
    return [
        Lesson(pocket, read_subject(CONCEPTS / name), config, slot * config.rank)
        for name, slot in SLOTS.items()
    ]


def trained(pocket, orthogonal):
    """Two concepts, and the down factors that they started from."""
    training = peers.DenseTraining(pocket, lessons(pocket), orthogonal)
    start = {name: down.detach().clone() for name, down in training.down.items()}
    try:
        list(training.steps())
        return training.dense(), start
    finally:
        training.close()


@pytest.fixture(scope="module")
def of_lora(pocket):
    """Trained with an Adam in which entries of nearly no gradient follow no rounding's sign."""
    before = snapshot(pocket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
        yield trained(pocket, False)
    assert_untouched(pocket, before)


@pytest.fixture(scope="module")
def pair(pocket):
    """Two concepts with factors that change every layer clearly."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    layers, width = target_layers(pocket.pipeline), pocket.pipeline.text_encoder.config.hidden_size

    def factors():
        return {n: (random(4, x.in_features), random(x.out_features, 4)) for n, x in layers.items()}

    return [peers.Dense(f"<{name}>", factors(), random(2, width)) for name in NAMES]


# Subjects


def test_forty_subjects_have_tokens_of_their_own_and_room_at_the_rank(pocket):
    assert len(plan.SUBJECTS) == len(set(plan.SUBJECTS)) == max(plan.COUNTS) == 40
    layers = target_layers(pocket.pipeline).values()
    assert min(min(x.in_features, x.out_features) for x in layers) >= 40 * plan.RANK


def test_subjects_are_held_out_and_follow_the_rule_of_new_nouns():
    lines = (ROOT / "concepts" / "HELD_OUT.txt").read_text().splitlines()
    nouns = dict(line.split("\t")[:2] for line in lines if not line.startswith("#"))
    committed = {path.parent.name for path in ROOT.glob("concepts/*/concept.toml")}
    expected = list(plan.HELD_OUT)
    for name, noun in nouns.items():
        if name not in committed and noun not in {nouns[known] for known in expected}:
            expected.append(name)
    assert list(plan.SUBJECTS) == expected and not committed & set(expected)


# Dense factors in training


@pytest.mark.parametrize("number", [0, 1])
def test_a_lora_in_a_group_learns_what_pefts_lora_learns_alone(
    pocket, of_lora, number, monkeypatch
):
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
    concepts, start = of_lora
    oracle = lora.LoraTraining(pocket, read_subject(CONCEPTS / NAMES[number]), QUICK, start=0)
    try:
        for name, layer in oracle.adapted.items():
            (factor,) = layer.lora_A.values()
            factor.weight.data.copy_(start[name][number])
        list(oracle.steps())
        expected = oracle.lora()
    finally:
        oracle.close()
    assert concepts[number].token == f"<{NAMES[number]}>"
    assert close(concepts[number].vectors, expected.vectors)
    for factor in (0, 1):
        got, known = (
            torch.cat([factors[name][factor].flatten() for name in sorted(expected.factors)])
            for factors in (concepts[number].factors, expected.factors)
        )
        assert close(got, known)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-3 * expected.norm() > 0)


def test_both_factors_of_a_lora_move_and_no_two_concepts_start_alike(of_lora):
    concepts, start = of_lora
    for name, down in start.items():
        assert not torch.equal(down[0], down[1])
        for k, concept in enumerate(concepts):
            assert not torch.equal(concept.factors[name][0], down[k])
            assert concept.factors[name][1].any()


def test_rows_pass_through_the_weight_of_their_own_concept_in_training_alone(pocket):
    training = peers.DenseTraining(pocket, lessons(pocket), False)
    generator = torch.Generator().manual_seed(0)
    try:
        name, up = next(iter(training.up.items()))
        layer = training.lessons[0].layers[name]
        up.data.copy_(torch.randn(up.shape, generator=generator))
        x = torch.randn(4, 5, layer.in_features, generator=generator)
        training._train_mode(True)
        got = layer(x)
        training._train_mode(False)
        for row, concept in enumerate((0, 0, 1, 1)):
            weight = layer.weight + up[concept] @ training.down[name][concept]
            expected = torch.nn.functional.linear(x[row], weight, layer.bias)
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)
        plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), plain)
    finally:
        training.close()


def test_orthogonal_down_factors_stay_and_no_two_concepts_meet(pocket):
    before = snapshot(pocket)
    (one, other), start = trained(pocket, True)
    assert_untouched(pocket, before)
    for name, down in start.items():
        pair = one.factors[name][0], other.factors[name][0]
        assert torch.equal(pair[0], down[0]) and torch.equal(pair[1], down[1])
        assert one.factors[name][1].any() and other.factors[name][1].any()
        torch.testing.assert_close(pair[0] @ pair[0].T, torch.eye(4), rtol=0, atol=1e-5)
        assert (pair[0] @ pair[1].T).abs().max() < 1e-5


def test_the_basis_is_orthogonal_and_follows_layer_and_seed_alone():
    one = peers.basis("unet.a", 160, 0)
    torch.testing.assert_close(one @ one.T, torch.eye(160), rtol=0, atol=1e-5)
    assert torch.equal(one, peers.basis("unet.a", 160, 0))
    assert not torch.equal(one, peers.basis("unet.a", 160, 1))
    assert not torch.equal(one, peers.basis("unet.b", 160, 0))


# Dense factors in one model


def test_a_dense_merge_adds_weighted_products_and_restores_bit_for_bit(pocket, pair):
    before = snapshot(pocket)
    layers = target_layers(pocket.pipeline)
    own = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    model = peers.DenseModel(pocket)
    model.switch([(pair[0], 1.0), (pair[1], 0.25)])
    for name, layer in layers.items():
        parts = [up.double() @ down.double() for down, up in (c.factors[name] for c in pair)]
        expected = own[name].double() + parts[0] + 0.25 * parts[1]
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-4)
    assert {f"<{name}>" for name in NAMES} <= set(pocket.pipeline.tokenizer.get_added_vocab())
    model.switch([(pair[1], 1.0)])
    assert "<toytrain>" not in pocket.pipeline.tokenizer.get_added_vocab()
    model.restore()
    assert_untouched(pocket, before)


class Weighed:
    """Stands in for measures: a figure is how far the first layer's weight has moved."""

    def __init__(self, base, names=NAMES, broken=None):
        self.base, self.names, self.broken = base, names, broken
        self.layer = next(iter(target_layers(base.pipeline).values()))
        self.own = self.layer.weight.detach().clone()

    def part(self, numbers):
        part = Weighed(self.base, tuple(self.names[k] for k in numbers), self.broken)
        part.own = self.own
        return part

    def merged(self):
        if len(self.names) == self.broken:
            raise NonFiniteError("the picture became NaN")
        moved = (self.layer.weight - self.own).norm().item()
        return {name: {"moved": moved} for name in self.names}


@pytest.mark.parametrize(("weight", "shares"), [(1.0, (1, 1)), (0.6, (0.6, 0.6)), (None, (1, 0.5))])
def test_a_curve_merges_the_first_n_with_the_methods_weight(pocket, pair, weight, shares):
    before = snapshot(pocket)
    one, two = measures.curve(Weighed(pocket), pair, plan.Merge(weight), (1, 2), lambda text: None)
    name = next(iter(target_layers(pocket.pipeline)))
    products = [up @ down for down, up in (c.factors[name] for c in pair)]
    expected = [(shares[0] * products[0]).norm(), (shares[1] * sum(products)).norm()]
    assert one["each"] == {"toytrain": {"moved": pytest.approx(expected[0].item(), rel=1e-4)}}
    assert [v["moved"] for v in two["each"].values()] == pytest.approx(
        [expected[1].item()] * 2, rel=1e-4
    )
    assert_untouched(pocket, before)


def test_a_picture_that_is_not_finite_breaks_its_own_point_alone(pocket, pair):
    before = snapshot(pocket)
    stand_in = Weighed(pocket, broken=1)
    points = measures.curve(stand_in, pair, plan.Merge(), (1, 2), lambda text: None)
    assert [point["each"] is None for point in points] == [True, False]
    assert points[0]["broken"] == "the picture became NaN"
    assert_untouched(pocket, before)


def test_alone_each_concept_is_the_only_one_in_the_model(pocket, pair):
    found = measures.alone(Weighed(pocket), pair)
    name = next(iter(target_layers(pocket.pipeline)))
    for subject, concept in zip(NAMES, pair, strict=True):
        down, up = concept.factors[name]
        assert found[subject]["moved"] == pytest.approx((up @ down).norm().item(), rel=1e-4)
