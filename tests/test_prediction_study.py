"""The study of predictions: its random sets, its statistics, its record of made-up parts."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sbora_diffusion.core.prediction import ADDED, CALIBRATED
from sbora_diffusion.diffusion.moments import CalibrateConfig
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
measuring = importlib.import_module("prediction_study.measuring")
plan = importlib.import_module("prediction_study.plan")
statistics = importlib.import_module("prediction_study.statistics")
study = importlib.import_module("study_prediction")

NAMES = tuple("abcdefghijklmn")


# Sets


def test_random_sets_have_the_plans_sizes_and_follow_from_their_seed():
    sets = plan.drawn_sets(NAMES, plan.SETS)
    assert sets == plan.drawn_sets(NAMES, plan.SETS) != plan.drawn_sets(NAMES, plan.SETS, seed=0)
    assert [len(one) for one in sets[:8]] == list(plan.SIZES) and sets[-1] == NAMES
    assert len(set(sets)) == plan.SETS and all(list(one) == sorted(one) for one in sets)
    assert {name for one in sets[:8] for name in one} == set(NAMES)


def test_sets_of_few_concepts_are_no_larger_than_these():
    assert plan.drawn_sets(["a", "b"], 3) == [("a", "b")] * 3


# Statistics


def cloud(sets: int, each: int, noise: float, shift: float = 0.0):
    """y = 2 x − 1 + noise, and a shift that all points of a set have in common."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(sets):
        x = rng.normal(size=each)
        y = 2 * x - 1 + noise * rng.normal(size=each) + shift * rng.normal()
        found.append(list(zip(x.tolist(), y.tolist(), strict=True)))
    return found


def test_a_line_is_found_with_its_correlations():
    found = statistics.relation(cloud(8, 5, noise=0.0))
    values = {k: found[k]["value"] for k in statistics.FIGURES}
    assert values == {"pearson": 1.0, "spearman": 1.0, "slope": 2.0, "intercept": -1.0}
    assert found["slope"]["interval"] == [2.0, 2.0]
    assert (found["points"], found["sets"]) == (40, 8)


def test_figures_agree_with_numpy_on_noisy_points():
    sets = cloud(6, 7, noise=1.0)
    x, y = np.concatenate([np.asarray(one) for one in sets]).T
    found = statistics.relation(sets)
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    slope, intercept = np.polyfit(x, y, 1)
    expected = {
        "pearson": np.corrcoef(x, y)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1],
        "slope": slope, "intercept": intercept,
    }  # fmt: skip
    for figure, value in expected.items():
        assert found[figure]["value"] == pytest.approx(value, abs=1e-4)
        low, high = found[figure]["interval"]
        assert low < found[figure]["value"] < high


def test_sets_that_differ_as_wholes_make_intervals_wider_than_their_points_would():
    sets = cloud(12, 20, noise=0.1, shift=2.0)
    singly = [[point] for one in sets for point in one]
    widths = [
        np.diff(statistics.relation(of)["intercept"]["interval"]).item() for of in (sets, singly)
    ]
    assert widths[0] > 2 * widths[1]


def test_what_is_constant_has_no_correlation_and_one_set_no_interval():
    flat = statistics.relation([[(1.0, 2.0), (1.0, 3.0)], [(1.0, 1.0)]])
    assert all(flat[k] == {"value": None, "interval": None} for k in statistics.FIGURES)
    level = statistics.relation([[(1.0, 2.0), (2.0, 2.0)]] * 2)
    assert level["pearson"]["value"] is None and level["slope"]["value"] == 0
    (alone,) = ({k: one[k]["interval"] for k in statistics.FIGURES}
                for one in [statistics.relation([[(1.0, 2.0), (2.0, 3.0)]])])  # fmt: skip
    assert set(alone.values()) == {None}
    assert statistics.relation([[], []])["points"] == 0


# The record


def part(number: int, parts: int, broken: int | None = None) -> dict:
    """Alignment falls with "good" by 0.1 in calibrated models, text with nothing; "bad" is noise,
    and "none" has no value."""
    rng = np.random.default_rng(number)
    alone = {name: dict(zip(FIGURES, (0.7, 0.8, 0.5), strict=True)) for name in NAMES}
    sets = []
    for k, names in list(enumerate(plan.drawn_sets(NAMES, 8)))[number - 1 :: parts]:
        ways = {"seconds": 0.5}
        for way, slope in ((CALIBRATED, 0.1), (ADDED, 0.3)):
            good = {name: float(rng.uniform(0.2, 1)) for name in names}
            predictors = {
                n: {"bad": float(rng.uniform()), "good": x, "none": float("nan")}
                for n, x in good.items()
            }
            each = {n: {
                "text_alignment": 0.7, "pocket-clip": 0.8 - slope * x - 0.01,
                "efficientnet-lite2": 0.5 - slope * x - 0.03,
            } for n, x in good.items()}  # fmt: skip
            distance = {k: 0.1 * len(names) for k in FIGURES[1:]}
            ways[way] = {
                "predictors": predictors, "generic": len(names) / 100,
                "each": each, "distance": distance,
            }  # fmt: skip
        if k == broken:
            ways[ADDED] |= {"each": None, "distance": None, "broken": "NaN"}
        sets.append({"number": k, "concepts": list(names), "ways": ways})
    run = {"date": "2026-01-01", "commit": "c", "device": "d", "versions": {}, "seconds": 1.0}
    about = {"training": {"steps": 1}, "calibration": {"steps": 3}, "rule_seed": 0}
    return {**about, "alone": alone, "sets": sets, "run": run}


FIGURES = ("text_alignment", "pocket-clip", "efficientnet-lite2")


@pytest.fixture
def joined(tmp_path, monkeypatch, capsys):
    """The record of two parts, and what was printed."""
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    files = tmp_path / "files"
    files.mkdir()
    for number in (1, 2):
        (files / f"part_{number}_of_2.json").write_text(json.dumps(part(number, 2, broken=3)))
    args = argparse.Namespace(files=files, record=tmp_path / "r.json")
    study.report(args)
    text = args.record.read_text()
    assert "NaN" not in text.replace('"NaN"', "")
    return json.loads(text), capsys.readouterr().out


def test_the_record_has_every_set_in_order_and_what_each_concept_lost(joined):
    record, _ = joined
    assert [tuple(one) for one in record["sets"]] == plan.drawn_sets(NAMES, 8)
    assert len(record["runs"]) == 2 and record["subjects"] == list(NAMES)
    calibrated, added = record["ways"][CALIBRATED], record["ways"][ADDED]
    count = sum(len(one) for one in record["sets"])
    assert len(calibrated["points"]) == calibrated["loss"]["image_alignment"]["of"] == count
    assert (calibrated["broken_sets"], added["broken_sets"]) == (0, 1)
    assert len(added["points"]) == count - len(record["sets"][3])
    for point in calibrated["points"]:
        expected = 0.1 * point["predictors"]["good"] + 0.02
        assert point["loss"]["image_alignment"] == pytest.approx(expected, abs=2e-5)
        assert point["loss"]["text_alignment"] == 0
        assert point["concept"] in record["sets"][point["set"]]


def test_the_best_predictor_is_named_with_its_line_in_sets_it_was_not_chosen_on(joined):
    record, said = joined
    for way, slope in ((CALIBRATED, 0.1), (ADDED, 0.3)):
        best = record["ways"][way]["best"]
        both = best["held_out_sets"]["image_alignment"]
        assert best["predictor"] == "good" and both["sets"] == (4 if way == CALIBRATED else 3)
        assert both["slope"]["value"] == pytest.approx(slope, abs=1e-3)
        assert both["intercept"]["value"] == pytest.approx(0.02, abs=1e-3)
        assert both["pearson"]["value"] == pytest.approx(1, abs=1e-3)
        assert f"{way}: good" in said
    assert "Loss('good', 0.1, 0.02, 1.0, " in said


def test_every_predictor_is_held_against_every_figure(joined):
    way = joined[0]["ways"][CALIBRATED]
    assert list(way["predictors"]) == ["bad", "good", "none"]
    for found in way["predictors"].values():
        for level in ("concepts", "set_means"):
            assert set(found[level]) == {*FIGURES, "image_alignment"}
    good = way["predictors"]["good"]
    assert good["set_means"]["pocket-clip"]["points"] == 8
    assert good["concepts"]["text_alignment"]["pearson"]["value"] is None
    assert abs(way["predictors"]["bad"]["concepts"]["image_alignment"]["pearson"]["value"]) < 0.5
    assert way["predictors"]["none"]["concepts"]["image_alignment"]["points"] == 0
    unrelated = way["unrelated_prompts"]["efficientnet-lite2"]
    assert unrelated["pearson"]["value"] == 1.0 and unrelated["slope"]["value"] == 10.0


def test_a_report_without_parts_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no parts"):
        study.report(argparse.Namespace(files=tmp_path, record=tmp_path / "r.json"))


# A set


class Judged:
    """Stands in for measures: alignment is 1 in the bare base, and falls as weights move."""

    def __init__(self, base, names):
        self.base, self.names = base, names
        self.layer = base.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        self.own = self.layer.weight.detach().clone()

    def part(self, numbers):
        return Judged.__new__(Judged)._with(self, [self.names[k] for k in numbers])

    def _with(self, whole, names):
        self.__dict__ = {**whole.__dict__, "names": names}
        return self

    def moved(self) -> float:
        return (self.layer.weight - self.own).norm().item()

    def merged(self):
        return {name: {"pocket-clip": 1 - self.moved()} for name in self.names}

    def unrelated(self):
        return [self.moved()]

    def distance(self, pictures, others):
        return {"pocket-clip": pictures[0] - others[0]}


def test_a_set_is_predicted_and_merged_in_both_ways_and_leaves_the_base_bare(pocket, tmp_path):
    concepts = [strong_concept(pocket, tmp_path, n, slot=k) for k, n in enumerate(("a", "b", "c"))]
    before = snapshot(pocket)
    quick = CalibrateConfig(prompts=("a photo of {}",), generic=1, steps=1)
    merges = measuring.Merges(Judged(pocket, ["a", "b", "c"]), concepts, quick)
    found = merges.of(("a", "c"))
    assert_untouched(pocket, before)
    assert found["concepts"] == ["a", "c"]
    calibrated, added = (found["ways"][way] for way in (CALIBRATED, ADDED))
    for way in (calibrated, added):
        assert set(way["each"]) == set(way["predictors"]) == {"a", "c"}
        moved = 1 - way["each"]["a"]["pocket-clip"]
        assert moved > 0 and way["distance"]["pocket-clip"] == pytest.approx(moved)
    assert added["each"] != calibrated["each"]
    assert added["generic"] > calibrated["generic"] > 0
    assert added["predictors"]["a"]["rms"] > calibrated["predictors"]["a"]["rms"]
