"""The study of merging: its threes, its statistics, its figures on made-up scores, its files."""

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.evaluate import EvaluateConfig
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
plan = importlib.import_module("merging_study.plan")
statistics = importlib.import_module("merging_study.statistics")
archives = importlib.import_module("merging_study.archive")
drawing = importlib.import_module("merging_study.drawing")
judging = importlib.import_module("merging_study.judging")

RECORD = ROOT / "results" / "merging_quality.json"
FOURTEEN = {f"c{k}": "character" if k < 7 else "object" for k in range(14)}


# The threes


def kinds_by_concept(categories: dict[str, str]) -> Counter:
    found = plan.threes(categories, 0)
    return Counter((name, three.kind) for three in found for name in three.concepts)


@pytest.mark.parametrize("sizes", [(7, 7), (3, 3), (3, 4), (6, 5)])
def test_every_concept_is_in_a_three_of_its_category_and_in_a_mixed_one(sizes):
    names = [f"c{k}" for k in range(sum(sizes))]
    categories = {name: "ab"[k >= sizes[0]] for k, name in enumerate(names)}
    counts = kinds_by_concept(categories)
    assert counts.keys() == {(name, kind) for name in names for kind in (plan.SAME, plan.MIXED)}
    assert max(counts.values()) <= 2


def test_threes_are_three_different_concepts_of_one_category_or_of_both():
    for three in plan.threes(FOURTEEN, 0):
        assert len(set(three.concepts)) == 3
        mixed = len({FOURTEEN[name] for name in three.concepts}) == 2
        assert three.kind == (plan.MIXED if mixed else plan.SAME)


def test_threes_depend_on_the_seed_alone():
    backwards = dict(reversed(FOURTEEN.items()))
    assert plan.threes(FOURTEEN, 0) == plan.threes(backwards, 0) != plan.threes(FOURTEEN, 1)


@pytest.mark.parametrize("categories", [{"a": "x", "b": "x", "c": "x"}, {"a": "x", "b": "y"}])
def test_too_few_concepts_are_refused(categories):
    with pytest.raises(SystemExit, match="three concepts or more"):
        plan.threes(categories, 0)


def test_categories_of_very_different_size_are_refused():
    uneven = {f"c{k}": "a" if k < 3 else "b" for k in range(12)}
    with pytest.raises(SystemExit, match="too many"):
        plan.threes(uneven, 0)


def test_parts_share_the_concepts_without_rest():
    names = list(FOURTEEN)
    parts = [plan.part_of(names, part, 3) for part in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    with pytest.raises(SystemExit):
        plan.part_of(names, 4, 3)


def test_unrelated_prompts_name_no_concept():
    nouns = {
        line.split('"')[1]
        for path in (ROOT / "concepts").glob("*/concept.toml")
        for line in path.read_text().splitlines()
        if line.startswith("class_noun")
    }
    assert len(set(plan.UNRELATED_PROMPTS)) == 20 and len(nouns) >= 14
    words = {word for prompt in plan.UNRELATED_PROMPTS for word in prompt.split()}
    assert not words & {word for noun in nouns for word in noun.split()}
    assert "<" not in "".join(plan.UNRELATED_PROMPTS)


# Statistics


def test_rank_correlation_sees_order_and_nothing_else():
    x = [0.1, 0.5, 0.2, 0.9, 0.7]
    assert statistics.rank_correlation(x, [v**3 for v in x])["value"] == 1
    assert statistics.rank_correlation(x, [-v for v in x])["value"] == -1
    assert statistics.rank_correlation(x, [1.0] * 5) == {"value": None, "interval": None, "of": 5}


def test_rank_correlation_agrees_with_the_formula_and_shares_ranks_in_ties():
    # 1 − 6 Σ d² / (n (n² − 1)) with d = (0, 1, −1, 1, −1): 1 − 24/120.
    assert statistics.rank_correlation([1, 2, 3, 4, 5], [1, 3, 2, 5, 4])["value"] == 0.8
    # Mid-ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4): 4.5 / √(4.5 · 5).
    tied = statistics.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4])["value"]
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-4)


def test_a_mean_stands_in_its_interval_which_narrows_with_more_values():
    rng = np.random.default_rng(0)
    few, many = (statistics.mean_figure(rng.normal(size=n).tolist()) for n in (8, 80))
    for figure in (few, many):
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    assert np.ptp(many["interval"]) < np.ptp(few["interval"])
    assert statistics.mean_figure([0.5]) == {"value": 0.5, "interval": None, "of": 1}


def test_the_interval_of_a_mean_is_about_two_standard_errors_either_side():
    values = np.random.default_rng(1).normal(size=400).tolist()
    low, high = statistics.mean_figure(values)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.05)


# Figures on made-up scores


def measures(text: float, image: float) -> dict[str, float]:
    return {judging.TEXT: text, "clip": image}


@pytest.fixture
def scored():
    """Concept a loses .2 and .4 with b, c and with all; b loses nothing; c loses half of that."""
    each, points = {}, []
    for name, loss in (("a", 0.2), ("b", 0.0), ("c", 0.1)):
        merged = {
            plan.SAME: measures(0.3, 0.8 - loss),
            plan.MIXED: measures(0.3, 0.8),
            plan.ALL: measures(0.25, 0.8 - 2 * loss),
        }
        each[name] = {
            plan.CLASS_WORD: measures(0.35, 0.4),
            plan.SINGLE: measures(0.3, 0.8),
            plan.ROUTED: measures(0.3, 0.8),
            **merged,
        }
        others = tuple(other for other in "abc" if other != name)
        points += [judging.Point(name, others, key, found) for key, found in merged.items()]
    return judging.Scored(each, points)


def test_changes_are_against_the_concept_alone(scored):
    found = judging.figures(scored)
    change = found["change_against_single"]
    assert change[plan.SAME]["clip"]["value"] == pytest.approx(-0.1)
    assert change[plan.ALL]["clip"]["value"] == pytest.approx(-0.2)
    assert change[plan.ALL][judging.TEXT]["value"] == pytest.approx(-0.05)
    assert change[plan.ROUTED]["clip"] == {"value": 0, "interval": [0, 0], "of": 3}
    assert found["means"][plan.SINGLE]["clip"]["value"] == 0.8
    assert set(found["means"]) == set(plan.CONDITIONS) and set(found["each"]) == set("abc")


def test_what_is_kept_is_a_share_of_the_gain_over_the_class_word(scored):
    kept = judging.figures(scored)["kept_of_the_image_gain"]
    assert kept[plan.SAME] == {"clip": pytest.approx(0.75)}
    assert kept[plan.MIXED] == {"clip": 1.0}
    assert kept[plan.ALL] == {"clip": pytest.approx(0.5)}


def test_predictions_add_the_squares_of_all_others_on_the_concepts_own_prompts(scored):
    rms = np.array([[1, 0.6, 0.8], [0.1, 1, 0.0], [0.3, 0.4, 1]])
    found = judging.crosstalk_figures(scored, ["a", "b", "c"], rms)
    predicted = {point["concept"]: point["predicted"] for point in found["points"]}
    assert predicted == {"a": pytest.approx(1.0), "b": pytest.approx(0.1), "c": pytest.approx(0.5)}
    assert found["rank_correlation"]["all"]["clip"]["value"] == 1
    assert found["rank_correlation"]["all"]["clip"]["of"] == 3
    assert found["rank_correlation"]["threes"]["clip"]["of"] == 6
    losses = [p["loss"]["clip"] for p in found["points"] if p["condition"] == plan.ALL]
    assert losses == [pytest.approx(0.4), 0, pytest.approx(0.2)]


def test_merge_times_are_medians_by_the_number_of_concepts():
    entries = [{"concepts": n, "seconds": s} for n, s in ((3, 0.1), (14, 1), (3, 0.2), (3, 0.9))]
    found = judging.merge_seconds(entries)
    assert found == {"3": {"median": 0.2, "of": 3}, "14": {"median": 1, "of": 1}}


# Pictures and their archive


@pytest.fixture(scope="module")
def drawn(pocket, tmp_path_factory):
    """One of three concepts that are the only three and all at once, one picture a prompt."""
    folder = tmp_path_factory.mktemp("strong")
    names = ("red", "green", "blue")
    concepts = {n: strong_concept(pocket, folder, n, slot=k) for k, n in enumerate(names)}
    config = EvaluateConfig(num=1, steps=1, guidance=1.0, seed=5)
    run = drawing.MergingRun(
        pocket, concepts, [plan.Three(plan.SAME, tuple(concepts))], config, archives.Archive()
    )
    before = snapshot(pocket)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawing, "PROMPTS", ("a photo of {}", "a drawing of {} in the snow"))
        run.draw(["red"], lambda text: None)
    run.close()
    assert_untouched(pocket, before)
    return run.archive


def test_every_condition_is_drawn_and_differs_from_the_concept_alone(drawn):
    three = f"{plan.SAME}/red/red+green+blue"
    groups = [f"{c}/red" for c in (plan.CLASS_WORD, plan.SINGLE, plan.ALL)] + [three]
    assert set(drawn.groups) == set(groups) and all(len(g) == 2 for g in drawn.groups.values())
    first = {name: pictures[0].tobytes() for name, pictures in drawn.groups.items()}
    assert first[three] == first[f"{plan.ALL}/red"]  # the same three concepts
    assert len(set(first.values())) == 3


def test_routing_draws_what_the_concept_draws_alone_bit_for_bit(drawn):
    assert drawn.facts["routing"] == {"red": {"equal": 2, "of": 2}}


def test_merge_times_are_noted_for_every_merge(drawn):
    assert [entry["concepts"] for entry in drawn.facts["merge_seconds"]] == [1, 3, 3]


def part(name: str, shade: int, settings: int = 1) -> "archives.Archive":
    facts = {
        "settings": settings, "concepts": {"a": {}, "b": {}}, "threes": [], "unrelated": [],
        "routing": {name: {"equal": 1, "of": 1}}, "merge_seconds": [name], "run": {"of": name},
    }  # fmt: skip
    noise = torch.randint(0, 256, (9, 7, 3), generator=torch.Generator().manual_seed(shade))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    return archives.Archive(facts, {f"single/{name}": [picture, picture.rotate(180)]})


def test_pictures_come_back_from_all_parts_without_loss(tmp_path):
    parts = [part("a", 0), part("b", 1)]
    for number, one in enumerate(parts):
        one.write(tmp_path / f"{number}.tar")
    found = archives.read_archives(tmp_path)
    for one in parts:
        for name, pictures in one.groups.items():
            assert [p.tobytes() for p in found.groups[name]] == [p.tobytes() for p in pictures]
    assert found.facts["runs"] == [{"of": "a"}, {"of": "b"}]
    assert found.facts["routing"].keys() == {"a", "b"}
    assert found.facts["merge_seconds"] == ["a", "b"]


def test_equal_pictures_give_equal_archives(tmp_path):
    for name in ("first", "second"):
        part("a", 0).write(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        ([], "the part with \\['b'\\] is missing"),
        ([part("b", 1, settings=2)], "settings"),
        ([part("a", 1), part("b", 1)], "two parts have"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, others, problem):
    for number, one in enumerate([part("a", 0), *others]):
        one.write(tmp_path / f"{number}.tar")
    with pytest.raises(SystemExit, match=problem):
        archives.read_archives(tmp_path)


# The record


@pytest.mark.skipif(not RECORD.exists(), reason="the study has not been recorded")
def test_the_record_has_every_condition_for_all_fourteen_concepts():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert len(record["concepts"]) == 14 and set(record["means"]) == set(plan.CONDITIONS)
    assert record["routed_equal_single"]["of"] == 14 * 20
    assert len(record["crosstalk"]["points"]) == 14 + 3 * len(record["threes"])
    for condition, found in record["means"].items():
        for measure, figure in found.items():
            assert figure["of"] == 14 and figure["interval"][0] <= figure["value"]
            each = [c[condition][measure] for c in record["each"].values()]
            assert np.mean(each) == pytest.approx(figure["value"], abs=2e-4)
    assert all(" /" not in run["command"] for run in record["runs"])
