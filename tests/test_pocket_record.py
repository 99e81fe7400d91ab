"""The record of the pocket base's quality, and the pure parts of the script that writes it."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbora_diffusion.records import at_most

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
questions = importlib.import_module("pocket_evaluation.questions")
record = importlib.import_module("pocket_evaluation.record")
scenes = importlib.import_module("pocket_evaluation.scenes")
base_section = importlib.import_module("pocket_evaluation.base_section")
free_wording = importlib.import_module("pocket_evaluation.free_wording")
judge_section = importlib.import_module("pocket_evaluation.judge_section")
captions = importlib.import_module("world.captions")
plans = importlib.import_module("world.plans")
sprites = importlib.import_module("world.sprites")

RECORD = ROOT / "results" / "pocket_base.json"
LION = questions.Prompt("photo", ("lion",), "beach", "on the beach")
NOUNS = sorted(
    {noun for group in questions.ALIKE for noun in group}
    | {*captions.SYNONYMS, "lion", "sun", "banana", "violin", "anchor", "bagel", "robot", "crown"}
)
MEASURES = {"threshold": lambda value, bound: value >= bound, "limit": lambda v, b: v <= b}


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# The record


def bounded(node: Any) -> Iterator[dict]:
    """Every figure of a record that has a threshold or a limit."""
    if isinstance(node, dict):
        if node.keys() & MEASURES:
            yield node
        for child in node.values():
            yield from bounded(child)
    elif isinstance(node, list):
        for child in node:
            yield from bounded(child)


def inconsistent(node: Any) -> list[dict]:
    return [
        figure
        for figure in bounded(node)
        for name in figure.keys() & MEASURES
        if figure.get("met") is not MEASURES[name](figure["value"], figure[name])
    ]


@pytest.fixture(scope="module")
def written() -> dict:
    assert RECORD.exists(), "run scripts/evaluate_pocket_base.py"
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_section_of_the_record_says_where_it_comes_from(written):
    runs = {run["section"]: run for run in written["runs"]}
    assert runs.keys() == {"judge", "base", "speed", "concepts", "ceiling"}
    assert runs.keys() <= written.keys()
    for run in runs.values():
        assert {"command", "commit", "device", "versions", "date", "seconds"} <= run.keys()
        assert " /" not in run["command"], "paths in a record are relative"


def test_every_verdict_of_the_record_follows_from_its_figure(written):
    assert inconsistent(written) == []


def test_the_record_holds_all_that_must_hold(written):
    recall, base = written["judge"]["recall_at_1_of_100"], written["base"]
    assert recall["seen_subjects"]["threshold"] == 0.90
    assert recall["held_out_subjects"]["threshold"] == 0.80
    assert base["one_subject"]["subject"]["threshold"] == 0.80
    assert base["one_subject"]["scene"]["threshold"] == 0.95
    assert base["accessory"]["accessory"]["threshold"] == 0.70
    assert base["two_subjects"]["both_subjects"]["threshold"] == 0.65
    assert {base[name]["subject"]["of"] for name in ("one_subject", "accessory")} == {500}
    assert written["speed"]["one_picture_seconds"]["limit"] == 3.0
    assert written["speed"]["training_step_seconds"]["limit"] == 0.6
    assert written["concepts"]["concepts"] == len(list(ROOT.glob("concepts/*/concept.toml")))
    gains = written["concepts"]["image_alignment_gain"]
    assert len(gains) == 2 and all(gain["threshold"] == 0.10 for gain in gains.values())
    assert written["concepts"]["text_alignment_change"]["limit"] == 0.05


def test_the_record_holds_what_a_concept_gained_beside_what_could_be_gained(written):
    ceiling, measured = written["ceiling"], written["concepts"]
    assert ceiling["each"].keys() == measured["each"].keys()
    for judge, gain in ceiling["gain"]["concept"].items():
        assert gain == pytest.approx(measured["image_alignment_gain"][judge]["value"], abs=2e-4)
        assert gain < ceiling["gain"]["real_through_autoencoder"][judge]
        assert ceiling["gain"]["real_through_autoencoder"][judge] < ceiling["gain"]["real"][judge]


@pytest.mark.parametrize(
    "figure",
    [
        {"value": 0.5, "threshold": 0.6, "met": True},
        {"value": 0.5, "limit": 0.6, "met": False},
        {"value": 0.5, "limit": 0.6},
    ],
)
def test_a_wrong_or_missing_verdict_is_found(figure):
    assert inconsistent({"a": [figure]}) == [figure]


def test_sections_are_replaced_one_by_one_and_others_stay(tmp_path):
    file = tmp_path / "new" / "record.json"
    run = {key: key for key in ("command", "commit", "device", "date", "seconds")}
    run["versions"] = {"torch": "1"}
    record.write_section(file, "base", {"a": 1}, run)
    record.write_section(file, "speed", {"b": 2}, run)
    record.write_section(file, "base", {"a": 3}, {**run, "device": "another"})
    found = json.loads(file.read_text())
    assert found["base"] == {"a": 3} and found["speed"] == {"b": 2}
    assert [r["section"] for r in found["runs"]] == ["speed", "base"]
    assert found["device"] == "another" and found["runs"][0]["device"] == "device"


# Figures


def test_wilson_intervals_agree_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        assert record.wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)
    assert record.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert record.wilson(29, 29)[1] == 1.0


def test_a_share_counts_and_is_held_against_its_threshold():
    figure = record.share([True, True, True, False], 0.75)
    assert (figure["value"], figure["met"], figure["of"]) == (0.75, True, 4)
    assert record.share([True, False], 0.6)["met"] is False
    assert "threshold" not in record.share([True])


def test_limits_are_met_from_below():
    assert at_most(3.0, 3.0)["met"] and not at_most(3.0001, 3.0)["met"]


def test_confusions_are_counted_most_frequent_first():
    found = base_section.confusions(["dog", "dog", "cat", "cat"], ["cat", "cat", "cat", "dog"])
    assert found == [
        {"asked": "dog", "found": "cat", "count": 2},
        {"asked": "cat", "found": "dog", "count": 1},
    ]


def test_two_subjects_are_found_together_alone_or_not_at_all():
    found = base_section.found_of_two([True, True, False, False], [True, False, True, False])
    assert found == {"both": 1, "first_only": 1, "second_only": 1, "none": 1}


def test_cosines_leave_out_each_picture_with_itself():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 1.0]])
    found = judge_section.cosines(features, torch.tensor([0, 0, 1, 1]))
    assert found["mean_cosine_within_a_concept"] == pytest.approx((0.6 + 1.0) / 2)
    assert found["mean_cosine_between_concepts"] == pytest.approx((0 + 0 + 0.8 + 0.8) / 4)


# Questions


def test_a_prompt_words_all_its_parts():
    assert LION.text() == "a photo of a lion on the beach"
    assert replace(LION, accessory="hat").text() == "a photo of a lion wearing a hat on the beach"
    two = replace(LION, nouns=("owl", "apple"), relation="under", art=None)
    assert two.text() == "a picture of an owl under an apple on the beach"
    red = replace(LION, colour="orange", size="big", drawn="pixel art")
    assert red.text() == "pixel art of a big orange lion on the beach"


@pytest.mark.parametrize("name", ["subject", "scene", "scene_or_flat_colour"])
def test_options_differ_from_the_prompt_in_one_part_alone(name):
    question = questions.QUESTIONS[name](LION, NOUNS, rng())
    assert question.texts[-1] == LION.text() and len(set(question.texts)) == len(question.texts)
    kept = "on the beach" if name == "subject" else "a photo of a lion"
    assert all(kept in text for text in question.texts)
    assert question.labels.count(question.truth) == 1


def test_a_subject_is_one_of_fifty_and_a_scene_one_of_all():
    assert len(questions.subject(LION, NOUNS, rng()).texts) == 50
    assert set(questions.scene(LION, NOUNS, rng()).labels) == set(captions.PLACES)


def test_the_second_subject_is_exchanged_and_the_first_kept():
    two = replace(LION, nouns=("lion", "banana"))
    question = questions.second_subject(two, NOUNS, rng())
    assert question.truth == "banana" and "lion" not in question.labels
    assert all(text.startswith("a photo of a lion next to ") for text in question.texts)


@pytest.mark.parametrize("noun", NOUNS)
def test_no_candidate_may_name_the_subject_too(noun):
    prompt = replace(LION, nouns=(noun,))
    wrong = questions.subject(prompt, NOUNS, rng()).labels[:-1]
    synonyms = {noun, captions.SYNONYMS.get(noun, noun)}
    synonyms |= {n for n, s in captions.SYNONYMS.items() if s == noun}
    assert wrong and synonyms.isdisjoint(wrong) and "sun" not in wrong  # the beach shows one
    assert not any(noun in group and group & set(wrong) for group in questions.ALIKE)


def test_kinds_of_one_thing_are_alike_and_words_within_words_are_not():
    assert questions.alike("bear", "teddy bear") and questions.alike("police car", "car")
    assert questions.alike("boat", "ship") and questions.alike("tent", "circus tent")
    assert not questions.alike("ant", "elephant") and not questions.alike("lion", "tiger")


def test_what_a_subject_wears_is_no_candidate_for_it():
    prompt = replace(LION, accessory="crown")
    assert "crown" not in questions.subject(prompt, NOUNS, rng()).labels
    assert set(questions.QUESTIONS["accessory"](prompt, NOUNS, rng()).labels) == set(plans.DROP)


def test_plain_pictures_have_an_answer_among_the_drawing_styles():
    question = questions.drawing_style(LION, NOUNS, rng())
    assert question.truth == questions.PLAIN and len(question.texts) == len(captions.DRAWN) + 1


def test_answers_are_the_labels_of_the_nearest_texts():
    vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0], "z": [-1.0, 0.0]}
    asked = [
        questions.Question(("x", "y"), ("ex", "why")),
        questions.Question(("y", "z", "x"), ("why", "zed", "ex")),
    ]
    pictures = torch.tensor([[0.9, 0.1], [-0.8, 0.5]])
    found = questions.answers(
        pictures, asked, lambda texts: torch.tensor([vectors[text] for text in texts])
    )
    assert found == ["ex", "zed"]


def test_free_prompts_are_thirty_and_their_plain_forms_name_known_scenes():
    assert len({text for text, _, _ in free_wording.FREE}) == 30
    for text, noun, scene in free_wording.FREE:
        assert noun in text and free_wording.plain(noun, scene).text() != text


# Cases


def sprite(noun: str, kind: str = "subject", style: str = "photo", category: str = "animal"):
    return sprites.Sprite(noun, None, kind, style, category, -0.9, 0.9, 0.0, 0.5, None, 1.0)


@pytest.fixture(scope="module")
def world() -> Any:
    """A world without pixels: only its plans are looked at."""
    animals = [f"animal{k}" for k in range(30)]
    chosen = [sprite(noun) for noun in animals]
    chosen += [sprite(noun, style="flat icon") for noun in animals]
    chosen += [sprite(noun, "accessory") for noun in plans.DROP]
    made = scenes.World.__new__(scenes.World)
    made.bank = sprites.SpriteBank(torch.zeros(len(chosen), 4, 1, 1), chosen)
    return made


def drawn_cases(world: Any, name: str, number: int = 24) -> list:
    kind = next(kind for kind in scenes.SETS if kind.name == name)
    return kind.cases(world, rng(), number)


@pytest.mark.parametrize("name", [kind.name for kind in scenes.SETS])
def test_prompts_are_of_pairs_that_training_never_sees(world, name):
    cases = drawn_cases(world, name)
    assert len(cases) == 24
    for case in cases:
        assert plans.reserved(case.prompt.nouns[0], case.prompt.scene)


def test_training_never_draws_a_reserved_pair(world):
    planner = plans.ScenePlanner(world.bank.sprites, 1)
    generator = rng()
    drawn = [planner.plan(generator) for _ in range(400)]
    assert not any(plans.reserved(m.noun, plan.scene) for plan in drawn for m in plan.mentions)


def test_prompts_come_from_the_plainest_art_set_unless_others_are_asked_for(world):
    assert {case.prompt.art for case in drawn_cases(world, "one_subject")} == {"photo"}
    assert {case.prompt.art for case in drawn_cases(world, "other_art_sets")} == {"flat icon"}


def test_plans_name_the_sprites_that_their_prompts_name(world):
    for name in ("two_subjects", "other_art_sets", "accessory"):
        for case in drawn_cases(world, name):
            rows = [int(row) for row in case.plan.layers[:, 0] if row >= 0]
            named = [world.bank.sprites[row].noun for row in rows]
            accessory = [case.prompt.accessory] if case.prompt.accessory else []
            assert named == [*case.prompt.nouns, *accessory]


def test_styles_and_colours_are_asked_for_evenly(world):
    styles = [case.prompt.drawn for case in drawn_cases(world, "drawing_styles", 20)]
    assert all(styles.count(style) == 2 for style in {*captions.DRAWN, None})
    for case in drawn_cases(world, "colours"):
        assert sprites.COLOURS[int(case.plan.layers[0, 6])] == case.prompt.colour


def test_the_same_seed_gives_the_same_cases_and_fewer_are_the_first_of_them(world):
    many, few = drawn_cases(world, "two_subjects", 9), drawn_cases(world, "two_subjects", 4)
    assert [case.prompt for case in many[:4]] == [case.prompt for case in few]
