"""A training that is killed anywhere and resumed gives the file of one that was not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.reliability.training_kills import Ending, Plan, endings

HARD = {
    "steps": 22, "dropout": 0.3, "gradient_accumulation": 2, "schedule": "cosine", "vectors": 2,
    "noise_offset": 0.1, "rate_text_encoder": 2e-3,
}  # fmt: skip
PRIOR = {"preservation": 1.0, "prior_weight": 0.5, "prior_images": 1, "gradient_accumulation": 2}
GROUP = ("plushbear", "baseballcap")


def with_resumption(plan: Plan) -> list[Plan]:
    return [plan, dataclasses.replace(plan, resume=True, step=0, call=0)]


def in_folders(tmp_path: Path, plans: list[Plan]) -> list[Plan]:
    """The whole training, then each that is killed and its resumption, in one folder each."""
    whole = dataclasses.replace(plans[0], folder=str(tmp_path / "whole"), every=0, step=0, call=0)
    placed = [
        dataclasses.replace(plan, folder=str(tmp_path / str(number)))
        for number, plan in enumerate(plans)
    ]
    return [whole, *(part for plan in placed for part in with_resumption(plan))]


def resumed_from(ending: Ending) -> int:
    """The step that a resumption says it goes on from."""
    said = [line for line in ending.told if line.startswith("going on from step")]
    return int(said[0].split()[4]) if said else 0


def exact(tmp_path: Path, plans: list[Plan], method: str = "fork") -> int:
    """How many died; all of them were resumed exactly, and lost one interval at most: nothing where
    the concept file was written."""
    whole, *pairs = endings(in_folders(tmp_path, plans), method)
    assert whole.status == 0 and whole.digests
    deaths = 0
    for plan, died, resumed in zip(plans, pairs[::2], pairs[1::2], strict=True):
        assert died.status in (-9, 0) and (died.status == -9 or plan.call)
        assert (resumed.status, resumed.digests) == (0, whole.digests), (plan, resumed.told)
        if died.status == -9:
            deaths += 1
            lost = 0 if died.digests == whole.digests else died.steps - resumed_from(resumed)
            assert lost <= plan.every, (plan, resumed.told)
    left = [entry.name for entry in tmp_path.rglob("*checkpoints*")]
    assert left == [] and not list(tmp_path.rglob(".sbora-*"))
    return deaths


def test_killed_at_a_step_or_in_a_save_it_is_resumed_exactly(tmp_path):
    hard = {**HARD, "steps": 4}
    in_saves = [Plan("", config=hard, call=call) for call in (6, 22)]
    assert exact(tmp_path, [Plan("", config=hard, every=2, step=3), *in_saves]) == 3


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("what", "plan"),
    [
        ("dropout, accumulation, cosine", Plan("", config=HARD, every=4)),
        ("folded FB", Plan("", config={"steps": 5, "variant": "fb"}, every=2)),
        ("two paths, FB", Plan("", config={"steps": 5, "variant": "fb", "dropout": 0.2}, every=2)),
        ("group", Plan("", GROUP, {"steps": 5, "gradient_accumulation": 2}, every=2)),
        ("prior, preservation", Plan("", config={"steps": 5, **PRIOR}, every=2)),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_killed_after_each_step_it_is_resumed_exactly(tmp_path, what, plan, record_property):
    steps = range(1, plan.config["steps"])
    kills = exact(tmp_path, [dataclasses.replace(plan, step=step) for step in steps])
    assert kills == len(steps)
    record_property(f"1 kills and exact resumes, {what}", kills)


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.reliability
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_on_a_device_it_is_resumed_exactly(tmp_path, device, record_property):
    """The usual recipe, which a GPU records and replays, and one with dropout and accumulation;
    each training in an interpreter of its own, as a GPU needs it."""
    usual, hard = {"steps": 4}, {**HARD, "steps": 4}
    for name, config, steps in (("usual", usual, (1, 2, 3)), ("hard", hard, (2, 3))):
        plans = [Plan("", config=config, step=step, device=device) for step in steps]
        (tmp_path / name).mkdir()
        kills = exact(tmp_path / name, plans, "spawn")
        assert kills == len(steps)
        record_property(f"1 kills and exact resumes on {device}, {name}", kills)


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("names", "saves"), [(("plushbear",), 3), (GROUP, 1)], ids=("one", "group")
)
def test_killed_at_each_call_of_its_saves_it_is_resumed_exactly(
    tmp_path, names, saves, record_property
):
    """Of the saves, of their removal, and of the concept files."""
    plan = Plan(str(tmp_path / "counted"), names, {"steps": saves + 1})
    (counted,) = endings([plan])
    calls = range(1, counted.calls + 1)
    kills = exact(tmp_path, [dataclasses.replace(plan, call=call) for call in calls])
    assert kills == len(calls) > saves * 10, "of each save four files, the folder and its parent"
    record_property("2 calls of saves killed, the training resumed exactly", kills)
