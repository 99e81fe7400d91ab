"""The study of how many concepts a model bears: subjects, and curves."""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.baselines.adapted import Adapted, AdaptedMeta
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
measures = importlib.import_module("number_study.measures")
plan = importlib.import_module("number_study.plan")

NAMES = ("toytrain", "baseballcap")


@pytest.fixture(scope="module")
def pair(pocket):
    """Two concepts with factors that change every layer clearly."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    layers, width = target_layers(pocket.pipeline), pocket.pipeline.text_encoder.config.hidden_size

    def factors():
        return {
            n: {"down": random(4, x.in_features), "up": random(x.out_features, 4)}
            for n, x in layers.items()
        }

    def meta(name):
        return AdaptedMeta(
            method="lora", form="low-rank", name=name, class_noun="toy", token=f"<{name}>",
            base_key=pocket.key, training={},
        )  # fmt: skip

    return [Adapted(meta(name), factors(), random(2, width)) for name in NAMES]


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


# Dense factors in one model


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
    products = [c.layers[name]["up"] @ c.layers[name]["down"] for c in pair]
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
        product = concept.layers[name]["up"] @ concept.layers[name]["down"]
        assert found[subject]["moved"] == pytest.approx(product.norm().item(), rel=1e-4)
