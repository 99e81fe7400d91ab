"""Records of the studies of crosstalk, and the page that shows them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from sbora_diffusion.core.prediction import ADDED, CALIBRATED
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.prediction_report import LOSSES, Loss

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
page = importlib.import_module("crosstalk_study.page")
rows = importlib.import_module("crosstalk_study.rows")
options = importlib.import_module("study_options")
profile = importlib.import_module("profile_speed")
FIGURES = options.FIGURES


def record(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def crosstalk() -> dict:
    return record("crosstalk")


def committed() -> set[str]:
    return {path.parent.name for path in ROOT.glob("concepts/*/concept.toml")}


def test_crosstalk_was_judged_on_subjects_that_are_not_committed_with_three_seeds(crosstalk):
    assert len(crosstalk["subjects"]) == 14 and not committed() & set(crosstalk["subjects"])
    for row in crosstalk["recipes"]:
        assert len(row["seeds"]) == 3 and "calibrated" in row["merged"]
        for way in row["merged"].values():
            assert way["seeds"] == row["seeds"]
            for name, figure in way["change"].items():
                assert way["worst"][name] <= figure["value"]
                assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]


def test_the_default_of_training_is_the_recipe_that_the_page_calls_it(crosstalk):
    chosen = next(row for row in crosstalk["recipes"] if row["recipe"] == page.WINNER)
    assert TrainConfig(**chosen["changes"]) == TrainConfig()
    assert {"added", "averaged", "calibrated, gain 1.1"} <= set(chosen["merged"])


def test_the_recipe_was_checked_on_the_committed_concepts_with_three_seeds():
    found = record("crosstalk_committed")
    assert set(found["subjects"]) == committed()
    for row in found["recipes"]:
        assert len(row["seeds"]) == 3 and {"added", "calibrated, gain 1.1"} <= set(row["merged"])
    assert {row["recipe"] for row in found["recipes"]} == {page.WINNER, "loud"}


def test_the_tables_of_the_page_on_crosstalk_are_those_of_the_record(crosstalk):
    text = (ROOT / "docs" / "crosstalk.md").read_text(encoding="utf-8")
    committed = {"committed": page.tables(record("crosstalk_committed"))["merges"]}
    assert options.with_tables(text, page.tables(crosstalk) | committed) == text
    assert all(f"| {row['recipe']} |" in text for row in crosstalk["recipes"])


def test_the_page_on_a_cpus_time_shows_its_record():
    text = (ROOT / "docs" / "speed_profile.md").read_text(encoding="utf-8")
    assert options.with_tables(text, profile.tables(record("speed_profile"))) == text


def test_the_curve_has_every_method_at_every_number_of_concepts():
    number = record("number")
    assert {m["method"] for m in number["methods"]} >= {
        "winner", "plain FA", "plain FB", "LoRA sum", "LoRA 1/n", "Orthogonal Adaptation, 0.6",
    }  # fmt: skip
    for method in number["methods"]:
        assert [point["concepts"] for point in method["curve"]] == [1, 2, 4, 8, 14, 28, 40]


def test_the_losses_that_a_check_predicts_are_those_of_the_record():
    ways = record("prediction")["ways"]
    assert set(ways) == set(LOSSES) == {CALIBRATED, ADDED}
    for way, found in ways.items():
        both = found["best"]["held_out_sets"]["image_alignment"]
        line = [both[k]["value"] for k in ("slope", "intercept", "pearson")]
        mean = found["loss"]["image_alignment"]["value"]
        assert LOSSES[way] == Loss(found["best"]["predictor"], *line, mean)


def test_diagnosis_has_both_variants_at_equal_rates():
    found = {(row["variant"], row["rate"]) for row in record("diagnosis")["rows"]}
    assert {v for v, _ in found} == {"fa", "fb"}
    assert {r for v, r in found if v == "fa"} == {r for v, r in found if v == "fb"}


# How runs become a record

RECIPE, BEST = "preserved", "loud"


def run(recipe: str, seed: int, alone: float, merged: dict[str, float]) -> dict:
    """Two concepts with equal figures; `merged`: way → figure of both."""
    ways = {
        way: {
            "seconds": 1.0,
            "each": figures(value),
            "distance": dict.fromkeys(FIGURES[1:], 0.1),
            "text_of_unrelated": 0.7,
        }
        for way, value in merged.items()
    }
    about = {"recipe": recipe, "seed": seed, "training_seconds": 1.0, "run": {"seed": seed}}
    return {**about, "alone": figures(alone), "merged": ways}


def figures(value: float) -> dict[str, dict[str, float]]:
    return {name: dict.fromkeys(FIGURES, value) for name in ("a", "b")}


def bound() -> dict:
    about = dict.fromkeys(("date", "commit", "device", "versions"), "x")
    return {"alone": figures(0.4), "noise": {}, "text_of_unrelated": 0.7, "run": about}


def test_changes_are_those_against_the_same_run_and_seeds_count_alike():
    runs = [run(BEST, seed, 0.6, {"added": 0.1, "calibrated": 0.5}) for seed in range(3)]
    runs += [run(RECIPE, seed, 0.6, {"added": 0.1, "calibrated": 0.5}) for seed in range(3)]
    runs.append(run(RECIPE, 0, 0.8, {"calibrated": 0.8}))  # seed 0 once more, with another result
    found = rows.record_of(bound(), runs)
    row = next(row for row in found["recipes"] if row["recipe"] == RECIPE)
    assert row["alone"]["pocket-clip"]["value"] == pytest.approx((0.7 + 0.6 + 0.6) / 3, abs=1e-4)
    calibrated = row["merged"]["calibrated"]
    expected = (-0.05 - 0.1 - 0.1) / 3
    assert calibrated["change"]["pocket-clip"]["value"] == pytest.approx(expected, abs=1e-4)
    against = row["alone"]["pocket-clip"]["value"] + expected - 0.6
    assert calibrated["change_against_best_plain"]["pocket-clip"]["value"] == pytest.approx(
        against, abs=2e-4
    )
    assert found["best_plain"] == {"recipe": BEST, "strong": ["a", "b"]}


def test_what_was_not_run_with_every_seed_is_left_out():
    runs = [run(BEST, seed, 0.6, {"added": 0.1, "calibrated": 0.5}) for seed in range(3)]
    runs += [run(RECIPE, seed, 0.6, {"added": 0.1}) for seed in range(2)]
    runs[0]["merged"]["averaged"] = runs[0]["merged"]["added"]
    found = rows.record_of(bound(), runs)
    assert [row["recipe"] for row in found["recipes"]] == [BEST]
    assert set(found["recipes"][0]["merged"]) == {"added", "calibrated"}
