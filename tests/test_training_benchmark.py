"""The training benchmark: fair turns, ratios within a round, contestants that do train."""

import pytest
import torch

from scripts import benchmark_training as benchmark


def test_every_contestant_has_a_turn_each_round_and_none_always_goes_first():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = benchmark.interleaved(steps, rounds=3, device="cpu", warm_up=1)
    assert [sorted(calls[k : k + 3]) for k in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert calls[::3] == ["a", "b", "c", "a"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_slow_round_slows_all_and_does_not_change_the_ratio():
    times = {"frozen": [1.0, 9.0, 1.0, 1.0], "other": [1.2, 10.8, 1.2, 1.2]}
    figures = benchmark.summary(times)
    assert figures["other"]["over_frozen"] == pytest.approx(1.2)
    assert figures["frozen"]["over_frozen"] == 1.0


def test_goals_are_met_at_the_threshold_and_missed_beyond_it():
    names = ["frozen", "sbora_fa_folded", "sbora_fb_folded", "peft_lora"]
    times = dict(zip(names, ([1.0] * 3, [1.1] * 3, [1.26] * 3, [1.265] * 3), strict=True))
    layer, pocket = benchmark.layer_figures(times), benchmark.pocket_figures(times)
    assert layer["sbora_fa_folded"]["goal"]["met"] and not layer["sbora_fb_folded"]["goal"]["met"]
    assert pocket["sbora_fa_folded"]["speed_in_loras"]["met"]
    assert not pocket["sbora_fb_folded"]["speed_in_loras"]["met"]


def test_the_layers_all_run_and_fold_where_they_are_called_folded(monkeypatch):
    monkeypatch.setattr(benchmark, "TOKENS", 8)
    monkeypatch.setattr(benchmark, "WIDTH", 32)
    with benchmark.layer_contestants("cpu", torch.float32) as steps:
        assert list(steps) == [
            "frozen", "sbora_fa_folded", "sbora_fa_write_back", "sbora_fa_two_paths",
            "sbora_fb_folded", "sbora_fb_write_back", "sbora_fb_two_paths", "peft_lora",
        ]  # fmt: skip
        for step in steps.values():
            step()
