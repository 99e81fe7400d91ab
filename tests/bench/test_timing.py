"""Turns are fair, ratios are taken within a round, and memory is counted once."""

import pytest
import torch
from torch import nn

from sbora_diffusion.bench import timing
from sbora_diffusion.bench.memory import peak_bytes
from sbora_diffusion.bench.timing import interleaved, summary


def test_every_contestant_has_a_turn_each_round_and_none_always_goes_first():
    calls: list[str] = []
    rounds: list[int] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(steps, 3, "cpu", warm_up=1, on_round=lambda: rounds.append(len(calls)))
    assert [sorted(calls[k : k + 3]) for k in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert calls[::3] == ["a", "b", "c", "a"] and rounds == [3, 6, 9, 12]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_no_round_begins_after_the_time_is_over_but_a_few_always_run():
    times = interleaved({"a": lambda: None}, 50, "cpu", warm_up=1, seconds=0.0)
    assert len(times["a"]) == timing.LEAST


def test_a_contestant_that_fails_on_its_way_is_out_and_the_others_go_on():
    turns, failures = [], []

    def fail_in_the_third():
        turns.append(1)
        if len(turns) == 3:
            raise RuntimeError("no room")

    steps = {"a": lambda: None, "b": fail_in_the_third, "c": lambda: None}
    times = interleaved(
        steps, 4, "cpu", 1, on_error=lambda name, error: failures.append((name, str(error)))
    )
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "c": 4}
    assert failures == [("b", "no room")] and len(turns) == 3
    turns.clear()
    with pytest.raises(RuntimeError, match="no room"):
        interleaved(steps, 4, "cpu", 1)


def test_nobody_takes_no_turns():
    assert interleaved({}, 3, "cpu") == {}


def test_a_slow_round_slows_all_and_does_not_change_the_ratio():
    frozen, other = [1.0, 9.0, 1.0, 2.0], [1.2, 10.8, 1.2, 2.4]
    figures = summary(other, frozen)
    assert figures["over_floor"] == pytest.approx(1.2)
    assert figures["over_floor_quartiles"] == pytest.approx([1.2, 1.2])
    assert (figures["median"], figures["rounds"]) == (1.8, 4)
    assert summary(frozen, frozen)["over_floor"] == 1.0


def test_the_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    frozen, other = [1.0, 10.0, 2.0], [2.0, 10.0, 8.0]
    assert summary(other, frozen)["over_floor"] == 2.0
    assert summary(other, frozen)["median"] / summary(frozen, frozen)["median"] == 4.0


def saved_by(model: nn.Module, x: torch.Tensor) -> int:
    return peak_bytes(lambda: model(x).sum().backward(), model, "cpu")


def test_a_frozen_layer_saves_nothing_and_a_trained_one_its_input():
    x = torch.randn(7, 5)
    layer = nn.Linear(5, 3, bias=False)
    assert saved_by(layer, x) == x.nbytes
    layer.requires_grad_(False)
    assert saved_by(layer, x.requires_grad_()) == 0


def test_what_two_layers_share_is_counted_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.one(x) + self.two(x.view(2, 3, 4)).view(6, 4)

    x = torch.randn(6, 4)
    assert saved_by(Both(), x) == x.nbytes
