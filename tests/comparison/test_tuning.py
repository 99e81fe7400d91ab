"""Tuning: as many trials for each method, on subjects of their own, and what is read of it."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.comparison.lines import read_lines
from sbora_diffusion.comparison.measuring import worth
from sbora_diffusion.comparison.opening import to_tune
from sbora_diffusion.comparison.preset import load_preset
from sbora_diffusion.comparison.tuning import read_tuned, run_tuning, trials_of, tuned_record
from sbora_diffusion.core.errors import ConfigError, FormatError
from tests.comparison.conftest import NAMES, TUNED_ON
from tests.test_results import goals


@pytest.fixture
def trials(quick, work, preset):
    """The lines of all trials."""
    run_tuning(work(to_tune(preset)))
    return read_lines(Path("record"))


def test_every_method_has_as_many_trials_on_the_same_subjects(preset, trials):
    counted = {}
    for line in trials:
        counted.setdefault(line["method"], set()).add((line["trial"], line["concept"]))
        assert line["setting"]["config"].items() >= line["changes"].items()
    assert list(counted) == ["sbora-fa", "lora", "words"]
    for found in counted.values():
        assert found == {(k, name) for k in (0, 1) for name in TUNED_ON}
    assert not set(TUNED_ON) & set(NAMES)


def test_the_winner_has_the_highest_mean_of_text_and_image_alignment(preset, trials):
    record = tuned_record(preset, trials)
    for name, found in record["methods"].items():
        means = {}
        for line in trials:
            if line["method"] == name:
                means.setdefault(json.dumps(line["changes"]), []).append(worth(line["alone"]))
        best = max(means, key=lambda key: sum(means[key]))
        assert found["settings"] == json.loads(best) and len(found["trials"]) == 2
    assert {"what", "commit", "device", "versions", "date"} <= record.keys()
    assert all(run["command"] and run["seconds"] >= 0 for run in record["runs"])
    assert not list(goals(record))


def test_a_method_whose_trials_are_not_complete_has_no_winner(preset, trials):
    some = [x for x in trials if (x["method"], x["trial"], x["concept"]) != ("lora", 1, "trex")]
    assert tuned_record(preset, some)["methods"].keys() == {"sbora-fa", "words"}


def test_a_broken_trial_cannot_win(preset, trials):
    record = tuned_record(preset, trials)
    winner = record["methods"]["lora"]["settings"]
    for line in trials:
        if line["method"] == "lora" and line["changes"] == winner:
            line.pop("alone")
            line["broken"] = "NaN"
    assert tuned_record(preset, trials)["methods"]["lora"]["settings"] != winner


def test_recipes_take_what_their_tuning_or_that_of_another_entry_found(preset, trials):
    assert read_tuned(preset) == {}
    preset.tuned.write_text(json.dumps(tuned_record(preset, trials)))
    tuned = read_tuned(preset)
    assert tuned.keys() == {"sbora-fa", "lora", "lora-half", "words"}
    assert tuned["lora-half"] == tuned["lora"]
    config = preset.config("lora-half", 5, tuned["lora-half"])
    assert (config.rank, config.seed, config.rate_unet) == (2, 5, tuned["lora"]["rate_unet"])


def test_a_record_of_another_preset_is_refused(preset, trials):
    record = tuned_record(preset, trials)
    preset.tuned.write_text(json.dumps({**record, "preset": "other"}))
    with pytest.raises(FormatError, match="no record of tuning preset small"):
        read_tuned(preset)
    with pytest.raises(FormatError, match="no trial of preset small"):
        tuned_record(preset, [])


def test_grids_of_different_size_are_refused(preset_file):
    more = {"tuning": {"grids": {"words": {"rates": [{"rate_tokens": 1e-3}] * 3}}}}
    with pytest.raises(ConfigError, match="as many trials"):
        load_preset(str(preset_file), overrides=more)


def test_subjects_of_the_tables_cannot_be_tuned_on(preset_file):
    with pytest.raises(ConfigError, match="must not be tuned on"):
        load_preset(str(preset_file), overrides={"tuning": {"subjects": list(NAMES[:1])}})


def test_a_trial_changes_one_value_of_each_axis():
    pocket = load_preset("pocket")
    trials = trials_of(pocket, list(pocket.methods))
    counts = {name: sum(own == name for own, *_ in trials) for name, *_ in trials}
    assert set(counts.values()) == {12} and "class-word" not in counts
    assert len({json.dumps(changes) for name, _, changes in trials if name == "lora"}) == 12
