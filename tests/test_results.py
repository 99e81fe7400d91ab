"""Records of studies: what each one must say, and that `met` follows from value and threshold."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbora_diffusion.diffusion.config import TrainConfig

RESULTS = Path(__file__).parent.parent / "results"
RECORDS = sorted(RESULTS.rglob("*.json"))


def goals(node: Any) -> Iterator[dict]:
    """Every part of a record that stands beside a threshold."""
    if isinstance(node, dict):
        if "threshold" in node or ("limit" in node and "met" in node):
            yield node
        for child in node.values():
            yield from goals(child)
    elif isinstance(node, list):
        for child in node:
            yield from goals(child)


def wrong_goals(record: Any) -> list[dict]:
    return [g for g in goals(record) if g["met"] != is_met(g)]


def is_met(goal: dict) -> bool:
    if "limit" in goal:
        return goal["value"] <= goal["limit"]
    return goal["value"] >= goal["threshold"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_record_names_where_it_comes_from(path):
    record = json.loads(path.read_text())
    assert {"what", "commit", "device", "versions", "date"} <= record.keys()
    runs = record.get("runs", [record])
    assert runs and all(run["command"] and run["seconds"] > 0 for run in runs)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_goal_is_met_when_its_value_reaches_the_threshold(path):
    assert wrong_goals(json.loads(path.read_text())) == []


def test_a_wrong_verdict_is_found():
    assert wrong_goals({"a": [{"value": 1.0, "threshold": 2.0, "met": True}]})
    assert wrong_goals({"a": {"value": 2.0, "limit": 1.0, "met": True}})


def test_there_are_records():
    assert RECORDS


def test_the_default_recipe_is_the_one_that_was_chosen():
    record = json.loads((RESULTS / "recipes.json").read_text())
    later = {  # options of which that run knew nothing
        "preservation_rows": 1, "optimizer": "adamw", "ema": 0.0, "masked_loss": False,
        "aspect_buckets": False,
    }  # fmt: skip
    chosen_later = {"batch_size": 8, "rate_text_encoder": 2e-3, "rate_unet": 3e-3}
    chosen_later["preservation"] = 1.0  # results/crosstalk.json
    assert later | record["default"] | chosen_later == TrainConfig().model_dump(mode="json")
    assert {"default", "former default"} <= {row["recipe"] for row in record["recipes"]}


def test_recipes_were_judged_on_subjects_that_are_not_committed():
    record = json.loads((RESULTS / "recipes.json").read_text())
    committed = {path.parent.name for path in RESULTS.parent.glob("concepts/*/concept.toml")}
    assert len(record["subjects"]) >= 12 and not committed & set(record["subjects"])


def test_a_recipe_states_gain_and_interval_of_both_image_features_and_text():
    record = json.loads((RESULTS / "recipes.json").read_text())
    for row in record["recipes"]:
        assert set(row["gain"]) == {"text_alignment", "pocket-clip", "efficientnet-lite2"}
        for figure in row["gain"].values():
            low, high = figure["interval"]
            assert low <= figure["value"] <= high and figure["of"] == len(record["subjects"])


def test_the_speed_of_training_is_recorded_on_a_gpu_in_the_sizes_of_stable_diffusion():
    record = json.loads((RESULTS / "speed.json").read_text())
    batches = record["step"]["sd15"]["batches"]
    assert set(batches) == {"1", "4", "16"} and record["finished"] and not record["failed"]
    for batch in batches.values():
        assert {"frozen", "sbora_fa_folded", "sbora_fb_folded", "lora", "dora"} <= set(
            batch["methods"]
        )
        assert batch["goals"]


def test_folded_training_in_bf16_was_judged_with_several_seeds():
    record = json.loads((RESULTS / "folding.json").read_text())
    assert len(record["concepts"]) == 14 and len(record["seeds"]) >= 3
    for figure in record["figures"].values():
        assert all(len(found) == len(record["seeds"]) for found in figure["by_seed"].values())


def test_a_million_spoilt_files_were_tried_and_the_page_says_what_came_of_them():
    record = json.loads((RESULTS / "reliability.json").read_text())
    (run,) = [run for run in record["runs"] if run["name"].startswith("fuzz")]
    figures, page = run["figures"], (RESULTS.parent / "SECURITY.md").read_text(encoding="utf-8")
    assert figures["done"] >= 1_000_000 and figures["failures"] == []
    told = [figures[name] for name in ("files", "refused", "same", "forged_valid")]
    assert told[0] == sum(told[1:]) and all(f"{count:,}" in page for count in told)


def test_the_whole_list_passed_and_the_page_says_how_many_trainings_were_killed():
    record = json.loads((RESULTS / "reliability.json").read_text())
    (run,) = [run for run in record["runs"] if run["name"] == "full forms"]
    assert run["figures"].keys() == {"passed", "skipped", "lines"}
    page = (RESULTS.parent / "SECURITY.md").read_text(encoding="utf-8")
    counted = [line.split(maxsplit=2) for line in run["figures"]["lines"]]
    kills = {test: sum(int(n) for t, n, _ in counted if t == test) for test in "12"}
    assert f"{kills['1']} trainings were killed at a step and {kills['2']} within a" in page
