"""What is saved of a training, what is refused, and what stops a training without losing it."""

import dataclasses
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from sbora_diffusion import checkpointing, identity
from sbora_diffusion.core.checkpoints import MANIFEST, STATE, CheckpointFolder, Content
from sbora_diffusion.core.errors import (
    BaseMismatch,
    ConfigError,
    DataError,
    FormatError,
    IntegrityError,
    NonFiniteError,
    ResourceError,
)
from sbora_diffusion.diffusion import training_loop
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.runtime import Runtime, deterministic
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.thin_pocket import thin_pocket
from tests.reliability.training_kills import Plan, train

FILES = (STATE, MANIFEST, "weights.safetensors", "random.safetensors")
DAMAGES = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
}
CHECKPOINTS = "plushbear.checkpoints"


@pytest.fixture(scope="module")
def base(pocket):
    return thin_pocket(pocket)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def content(step: int) -> Content:
    tables = {"weights": {"0": torch.full((2, 3), float(step))}, "random": {"0": torch.ones(4)}}
    return Content({"step": step}, tables)


def saved(root: Path, *steps: int) -> CheckpointFolder:
    folder = CheckpointFolder(root)
    for step in steps:
        folder.write(step, content(step))
    return folder


def test_the_newest_two_checkpoints_are_kept_and_read_as_they_were_written(tmp_path):
    told: list[str] = []
    paths = saved(tmp_path / "c", 1, 2, 3).paths()
    assert [path.name for path in paths] == ["000002_step_2", "000003_step_3"]
    found = CheckpointFolder(tmp_path / "c").newest(told.append)
    assert found.document == {"step": 3} and told == []
    assert torch.equal(found.tensors["weights"]["0"], content(3).tensors["weights"]["0"])
    assert CheckpointFolder(tmp_path / "none").newest(told.append) is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_read(
    tmp_path, file, damage, record_property
):
    told: list[str] = []
    folder = saved(tmp_path, 1, 2)
    older, newer = folder.paths()
    DAMAGES[damage](newer / file)
    assert CheckpointFolder(tmp_path).newest(told.append).document == {"step": 1}
    assert len(told) == 1 and str(newer / file) in told[0] and "before" in told[0]
    DAMAGES[damage](older / file)
    with pytest.raises(IntegrityError, match=f"{newer.name}/{file} is"):
        CheckpointFolder(tmp_path).newest(told.append)
    record_property("3 damaged files of checkpoints named", 2)


def test_each_byte_of_a_manifest_counts(tmp_path, record_property):
    manifest = saved(tmp_path, 1).paths()[0] / MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=MANIFEST):
            CheckpointFolder(tmp_path).newest(lambda _: None)
    record_property("3 changed bytes of a manifest refused", len(whole))


def test_another_format_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr("sbora_diffusion.core.checkpoints.FORMAT", 2)
    saved(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(FormatError, match="format 2, 1 is read"):
        CheckpointFolder(tmp_path).newest(lambda _: None)


def test_what_a_dead_process_left_is_swept_and_a_living_ones_work_is_not(tmp_path):
    dead, alive = tmp_path / f".sbora-{2**22 + 1}-x", tmp_path / ".sbora-1-x"
    for folder in (dead, alive):
        folder.mkdir()
    CheckpointFolder(tmp_path).sweep()
    assert not dead.exists() and alive.exists()


def test_what_is_not_finite_is_not_written(tmp_path):
    broken = Content({}, {"weights": {"0": torch.tensor([1.0, float("inf")])}})
    with pytest.raises(NonFiniteError, match="weights 0"):
        saved(tmp_path, 1).write(2, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["000001_step_1"]


class Stop(Exception):
    """A death that leaves nothing to do."""


def stop_at(last: int):
    def on_step(step: int) -> None:
        if step == last:
            raise Stop

    return on_step


@pytest.fixture
def begun(base, tmp_path) -> Plan:
    """A training that ended after its third step, saved at the second."""
    plan = Plan(str(tmp_path), every=2)
    with pytest.raises(Stop):
        train(base, plan, [], stop_at(3))
    return dataclasses.replace(plan, resume=True)


def test_without_resume_a_checkpoint_is_mentioned_and_not_used(base, begun, tmp_path):
    told, steps = [], []
    train(base, dataclasses.replace(begun, resume=False), told, steps.append)
    assert steps == [1, 2, 3, 4]
    assert len(told) == 1 and str(tmp_path / CHECKPOINTS) in told[0] and "--resume" in told[0]
    assert not (tmp_path / CHECKPOINTS).exists()


def test_another_recipe_base_subject_or_slot_is_refused(base, pocket, begun, tmp_path, monkeypatch):
    def refused(plan, kind, match, on=base):
        with pytest.raises(kind, match=match):
            train(on, plan, [])

    refused(dataclasses.replace(begun, config={"rank": 4}), ConfigError, r"rank is 2, here it is 4")
    refused(dataclasses.replace(begun, config={"seed": 1}), ConfigError, r"seed is 0, here it is 1")
    refused(begun, BaseMismatch, "another training's: its base is pocket-", pocket)
    monkeypatch.setattr(
        "sbora_diffusion.diffusion.concepts.Subject.caption", lambda *_: "<plushbear>, a bear"
    )
    refused(begun, DataError, "plushbear.pictures is")
    assert (tmp_path / CHECKPOINTS).exists()


def test_the_slot_is_the_checkpoints_and_another_is_refused(base, begun, tmp_path):
    from sbora_diffusion.checkpointing import Checkpointing, checkpoint_folder, resumed_slots

    place = [checkpoint_folder(tmp_path / "plushbear.safetensors")]
    how = Checkpointing(1, resume=True)
    assert resumed_slots(how, place, None) == {"plushbear": 0}
    assert resumed_slots(Checkpointing(1), place, None) == {}
    with pytest.raises(ConfigError, match="slot of 'plushbear' is 0, here it is 3"):
        resumed_slots(how, place, {"plushbear": 3})


def test_a_lower_rate_goes_on_and_says_that_it_is_another_training(base, begun):
    told, steps = [], []
    train(base, dataclasses.replace(begun, config={"rate_unet": 1e-4}), told, steps.append)
    assert steps == [3, 4]
    assert any("not bit for bit" in line and "rate_unet was 0.003, is 0.0001" in line
               for line in told)  # fmt: skip


def test_the_thread_count_of_the_checkpoint_is_taken_and_given_back(base, begun):
    told, seen = [], []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        train(base, begun, told, lambda _: seen.append(torch.get_num_threads()))
        assert set(seen) == {before} and torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert f"as before, the training takes {before} threads" in told
    assert not any("not bit for bit" in line for line in told)


def test_the_order_that_is_wanted_holds_while_it_trains(base, begun, monkeypatch):
    """A GPU's, which the CPU keeps to here."""
    told, seen = [], []
    on_gpu = partial(deterministic, torch.device("cuda"))
    monkeypatch.setattr(checkpointing, "deterministic", lambda _: on_gpu())
    monkeypatch.setattr(base, "runtime", Runtime(deterministic=True))
    enabled = torch.are_deterministic_algorithms_enabled
    train(base, begun, told, lambda _: seen.append(enabled()))
    assert seen == [True, True] and not enabled()
    assert not any("not bit for bit" in line for line in told)


def test_a_checkpoint_that_does_not_name_the_order_goes_on_without_a_word(
    base, tmp_path, monkeypatch
):
    def environment(base):
        return {k: v for k, v in identity.environment(base).items() if k != "deterministic"}

    monkeypatch.setattr(checkpointing, "environment", environment)
    with pytest.raises(Stop):
        train(base, plan := Plan(str(tmp_path), every=1), [], stop_at(2))
    monkeypatch.undo()
    train(base, dataclasses.replace(plan, resume=True), told := [])
    assert told == ["going on from step 1 of 4"]


def poison(monkeypatch, kind, method, when, act):
    """Let `act` happen at the given call of a method."""
    original, calls = getattr(kind, method), []

    def poisoned(self, *args, **options):
        calls.append(1)
        result = original(self, *args, **options)
        return act(self, result) if len(calls) == when else result

    monkeypatch.setattr(kind, method, poisoned)


@pytest.mark.parametrize("names", [("plushbear",), ("plushbear", "baseballcap")], ids=len)
def test_a_gradient_that_is_not_finite_is_never_taken(
    base, tmp_path, monkeypatch, names, record_property
):
    kind = GroupTraining if len(names) > 1 else ConceptTraining
    poison(monkeypatch, kind, "_clip", 3, lambda _, norms: norms * float("inf"))
    plan = Plan(str(tmp_path), names)
    with pytest.raises(NonFiniteError, match=r"norm became inf at step 3; lower .*step 2 is saved"):
        train(base, plan, [])
    monkeypatch.undo()
    told: list[str] = []
    train(base, dataclasses.replace(plan, resume=True), told)
    assert "going on from step 2 of 4" in told
    record_property("15 trainings stopped at what is not finite", 1)


def test_a_weight_that_is_not_finite_is_seen_in_the_next_step_and_not_saved(
    base, tmp_path, monkeypatch, record_property
):
    def break_factor(training, _):
        with torch.no_grad():
            training.state.parameters[1].view(-1)[0] = float("inf")

    poison(monkeypatch, ConceptTraining, "_after_step", 3, break_factor)
    with pytest.raises(NonFiniteError, match=r"no longer finite.* at step 4;.*step 2 is saved"):
        train(base, Plan(str(tmp_path), every=2), [])
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(NonFiniteError, match="is not saved"):
        poison(monkeypatch, ConceptTraining, "_after_step", 2, break_factor)
        train(base, Plan(str(tmp_path / "b"), every=2), [])
    assert not list((tmp_path / "b").rglob("step_*"))
    record_property("15 trainings stopped at what is not finite", 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()], ids=repr)
def test_out_of_memory_saves_the_last_step_and_says_what_to_lower(
    base, tmp_path, monkeypatch, error, record_property
):
    def fail(*_):
        raise error

    whole = tmp_path / "whole"
    hard = {"dropout": 0.2, "gradient_accumulation": 2, "batch_size": 2}
    train(base, Plan(str(whole), config=hard), [])
    poison(monkeypatch, training_loop.TrainingLoop, "_losses", 6, fail)  # in the midst of step 3
    plan = Plan(str(tmp_path), config=hard, every=3)
    with pytest.raises(ResourceError, match=r"batch_size=1 .*accumulation=4.*step 2 is saved"):
        train(base, plan, [])
    monkeypatch.undo()
    train(base, dataclasses.replace(plan, resume=True), told := [])
    assert "going on from step 2 of 4" in told
    file = "plushbear.safetensors"
    assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
    record_property("16 trainings without memory saved and resumed exactly", 1)


def test_ctrl_c_lets_the_step_end_and_says_how_to_go_on(base, tmp_path):
    def interrupt(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    plan = Plan(str(tmp_path), every=3)
    with pytest.raises(KeyboardInterrupt):
        train(base, plan, told, interrupt)
    assert told == ["stopped; step 2 is saved: the same command with --resume goes on from there"]
    assert signal.getsignal(signal.SIGINT) is before
    train(base, dataclasses.replace(plan, resume=True), told)
    assert "going on from step 2 of 4" in told


def test_an_optimizer_step_that_is_interrupted_is_not_saved(base, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    poison(monkeypatch, torch.optim.AdamW, "step", 2, fail)
    with pytest.raises(ResourceError, match="memory is full; try") as caught:
        train(base, Plan(str(tmp_path), every=3), [])
    assert "is saved" not in str(caught.value) and not (tmp_path / CHECKPOINTS).exists()


def test_a_full_disk_is_told_and_does_not_end_the_training(base, tmp_path, monkeypatch):
    def full(*_):
        raise ResourceError("the disk is full")

    monkeypatch.setattr(CheckpointFolder, "write", full)
    train(base, Plan(str(tmp_path), every=3), told := [])
    assert told == ["step 3 is not saved: the disk is full"]
    assert (tmp_path / "plushbear.safetensors").exists()
