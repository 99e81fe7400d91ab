"""The record and the picture of how many concepts a model bears."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
plots = importlib.import_module("number_study.plots")
report = importlib.import_module("number_study.report")

RUN = {
    "command": "python", "commit": "abc", "device": "none", "versions": {}, "date": "2026-01-01",
    "seconds": 1.0,
}  # fmt: skip
SUBJECTS = ("a", "b")


def figures(*values):
    """The same value of every figure, for the first subjects."""
    return {s: dict.fromkeys(report.FIGURES, v) for s, v in zip(SUBJECTS, values, strict=False)}


def file(seed, alone, one, two):
    def point(count, each):
        broken = {} if each else {"broken": "not finite"}
        return {"concepts": count, "seconds": each and 0.1 + seed, "each": each, **broken}

    return {
        "training": "LoRA", "about": "", "config": {"rank": 4, "seed": seed}, "seed": seed,
        "merges": {"LoRA sum": {"weight": 1.0, "calibration": None}}, "training_seconds": 9.0,
        "alone": alone, "merged": {"LoRA sum": [point(1, one), point(2, two)]}, "run": RUN,
    }  # fmt: skip


@pytest.fixture
def record():
    """Two seeds in the wrong order; subject b alone is no better than its class word."""
    files = [
        file(1, figures(0.8, 0.5), figures(0.6), figures(0.5, 0.3)),
        file(0, figures(0.6, 0.5), figures(0.6), figures(0.3, 0.3)),
    ]
    return report.record_of({"alone": figures(0.5, 0.5), "run": RUN}, files)


@pytest.mark.parametrize("figure", report.FIGURES)
def test_the_record_has_changes_against_each_concept_alone_over_seeds(record, figure):
    (method,) = record["methods"]
    one, two = method["curve"]
    assert [one["concepts"], two["concepts"]] == [1, 2]
    assert one["change"][figure] == {"value": -0.1, "interval": None, "of": 1}
    assert two["value"][figure]["value"] == pytest.approx(0.35)
    assert two["change"][figure]["value"] == pytest.approx((-0.3 - 0.2) / 2)
    assert two["worst"][figure] == pytest.approx(-0.3)
    assert two["change_of_strong"][figure]["value"] == pytest.approx(-0.3)
    assert two["seconds"] == 1.1


def test_the_record_says_how_concepts_were_trained_and_which_are_strong(record):
    training = record["trainings"]["LoRA"]
    assert training["seeds"] == [0, 1] and training["config"] == {"rank": 4}
    assert training["strong"] == ["a"] and len(record["runs"]) == 3
    assert record["methods"][0]["merge"] == {"weight": 1.0, "calibration": None}


def test_a_point_that_broke_with_one_seed_has_no_figures_and_is_not_drawn():
    files = [
        file(0, figures(0.6, 0.5), figures(0.6), figures(0.5, 0.3)),
        file(1, figures(0.6, 0.5), figures(0.6), None),
    ]
    record = report.record_of({"alone": figures(0.5, 0.5), "run": RUN}, files)
    assert record["methods"][0]["curve"][1] == {"concepts": 2, "broken": "not finite"}
    assert "2: broken" in report.line(record["methods"][0])
    (curve,) = plots._panel(record, "pocket-clip", 0).curves
    assert [point[0] for point in curve.points] == [1]
    plots.number_picture(record)


def test_the_picture_places_points_between_whole_ticks_and_draws_every_method(record):
    panel = plots._panel(record, "pocket-clip", 0)
    low, high = panel.span
    assert low <= -0.25 and high >= 0.0 and panel.counts == [1, 2]
    assert panel.place(2, -0.25)[1] > panel.place(1, -0.1)[1] > panel.place(1, 0.0)[1]
    picture = plots.number_picture(record)
    colour = tuple(bytes.fromhex(plots.COLOURS[0][1:]))
    x, y = panel.place(2, -0.25)
    assert picture.getpixel((round(x), round(y))) == colour
