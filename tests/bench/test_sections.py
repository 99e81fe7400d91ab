"""What a run does with its sections: some fail, some are left out, and the record grows."""

import json
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from sbora_diffusion.bench import goals, mixed_batch, report, training
from sbora_diffusion.bench.methods import Site
from sbora_diffusion.bench.picture import panels
from sbora_diffusion.bench.plan import OutOfTimeError, make_plan
from sbora_diffusion.bench.settings import SpeedConfig
from sbora_diffusion.bench.shapes import SHAPES, random_model
from sbora_diffusion.bench.speed import run_speed
from sbora_diffusion.bench.steps import field_of
from tests.diffusion.thin_pocket import thin_pocket

QUICK = SpeedConfig(
    rounds=2, warm_up=1, layer_rounds=2, concepts=3, layer_width=32, layer_tokens=8, batches=[2],
    mixed_rows=3,
)  # fmt: skip


def test_mixed_batches_and_training_are_held_against_their_goals_on_a_gpu_at_full_size():
    def at(ratio):
        return {"at_best": {"mode": "graphs", "over_floor": ratio}}

    ways = {"frozen": at(1.0), "mixed_fa": at(1.11), "mixed_fb": at(1.12)}
    found = goals.mixed_goals("sd15", "cuda", 16, ways)
    assert [(goal["value"], goal["met"]) for goal in found.values()] == [
        (0.9009, True), (0.8929, False),
    ]  # fmt: skip
    assert goals.mixed_goals("sd15", "cuda", 8, ways) == {}
    assert goals.mixed_goals("tiny", "cuda", 16, ways) == {}
    assert goals.mixed_goals("sd15", "cpu", 16, ways) == {}
    assert goals.training_goals("cuda:0", 14, 300, 180.0)["seconds"]["met"]
    assert not goals.training_goals("cuda", 14, 300, 180.1)["seconds"]["met"]
    assert goals.training_goals("cpu", 14, 300, 1.0) == {}
    assert goals.training_goals("cuda", 14, 299, 1.0) == {}


def test_in_a_mixed_batch_every_layer_has_a_concept_of_its_own_for_each_row():
    base = random_model(SHAPES["tiny"], "cpu", torch.float32, 0)
    layers = {name: base.get_submodule(name) for name in SHAPES["tiny"].targets(base)}
    for variant, axis in (("fa", 1), ("fb", 0)):
        banks = mixed_batch._banks(layers, variant, 3, 2)
        assert banks.keys() == layers.keys() and len(banks) == 32
        for name, (bank,) in banks.items():
            assert bank.variant == variant and bank.indices.unique().numel() == 3 * 2
            assert int(bank.indices.max()) < layers[name].weight.shape[axis]
            assert bank.scale.eq(1).all() and not torch.equal(bank.factor[0], bank.factor[1])


def test_concepts_train_together_and_give_seconds_and_a_loss(pocket, monkeypatch):
    monkeypatch.setattr(training, "load_base", lambda *_: thin_pocket(pocket))
    config = QUICK.model_copy(update={"concepts": 2, "training_steps": 1})
    record = run_speed(make_plan(config, "cpu", ["training"]), "", "abc")
    found = record["training"]
    assert (found["concepts"], found["steps"]) == (2, 1) and record["failed"] == {}
    assert 0 < found["seconds"]["loading"] < found["seconds"]["all"]
    assert 0 < found["last_loss"] < 10
    assert "2 concepts of pocket" in report.markdown(record)


def test_a_section_that_fails_is_recorded_and_stops_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "FOLDER", tmp_path)
    plan = make_plan(QUICK, "cpu", ["training", "mixed_batch"], ["tiny"])
    record = run_speed(plan, "", "abc")
    assert "DataError: 0 of 3 concept folders" in record["failed"]["training"]
    assert record["mixed_batch"]["tiny"]["methods"] and record["finished"]
    assert "0 of 3 concept folders" in report.markdown(record)


def test_after_the_limit_nothing_new_begins_and_the_record_says_so():
    config = QUICK.model_copy(update={"limit": 1e-9})
    plan = make_plan(config, "cpu", ["layer", "step", "training"], ["tiny"], ["lora"])
    record = run_speed(plan, "", "abc")
    assert list(record["failed"]) == ["layer", "step tiny", "training"]
    assert all("limit of 1e-09 s" in reason for reason in record["failed"].values())
    assert not {"layer", "step", "training"} & record.keys() and report.tables(record)


def test_a_training_that_the_limit_ends_says_how_far_it_came():
    plan = make_plan(QUICK.model_copy(update={"limit": 1.0}), "cpu")
    with pytest.raises(OutOfTimeError, match="7 of 9"):
        training._check_time(replace(plan, ends=0.0), "7 of 9 steps were done")
    training._check_time(plan, "")


def test_the_limit_ends_a_step_section_between_two_batches(monkeypatch):
    config = QUICK.model_copy(update={"limit": 1e4, "batches": [1, 2]})
    plan = make_plan(config, "cpu", ["step"], ["tiny"], ["lora"])
    clock = [0.0]

    def on_part(_record):
        clock[0] = 2e4

    usual = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: usual() + clock[0])
    record = run_speed(plan, "", "abc", on_part=on_part)
    assert list(record["step"]["tiny"]["batches"]) == ["1"]
    assert "limit" in record["failed"]["step tiny"]


def test_the_record_is_handed_over_as_it_grows_and_can_be_rendered_at_any_time():
    config = QUICK.model_copy(update={"batches": [1, 2]})
    plan = make_plan(config, "cpu", ["mixed_batch", "step"], ["tiny"], ["lora"])
    parts = []
    whole = run_speed(plan, "", "abc", on_part=lambda part: parts.append(json.dumps(part)))
    grown = [json.loads(part) for part in parts]
    assert [part["finished"] for part in grown] == [False] * 3 and whole["finished"]
    assert [list(p.get("step", {}).get("tiny", {}).get("batches", {})) for p in grown] == [
        [], ["1"], ["1", "2"],
    ]  # fmt: skip
    for part in grown:
        assert "did not come to its end" in report.markdown(part) and panels(part)


def test_a_method_that_cannot_be_a_graph_is_not_tried_as_one():
    plan = make_plan(QUICK, "cpu", methods=["shira", "lora"])
    plan = replace(plan, config=QUICK.model_copy(update={"modes": ["eager", "graphs"]}))
    base = random_model(SHAPES["tiny"], "cpu", torch.float32, 0)
    with ExitStack() as stack:
        layers = SHAPES["tiny"].targets(base)
        field, failed = field_of(base, plan, lambda _, model: Site(model, layers, 2, stack))
    assert list(failed) == ["shira graphs"] and "not possible" in failed["shira graphs"]
    assert {"shira eager", "lora graphs", "frozen graphs"} <= field.keys()
