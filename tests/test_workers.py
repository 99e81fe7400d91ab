"""Several workers: each has its share, its slots and its GPU, and waits for no other."""

import os
import subprocess
import sys

import pytest
import torch

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library
from sbora_diffusion.workers import Worker, slots_of, this_worker
from tests.conftest import CONCEPTS

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def launched(monkeypatch):
    def launch(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield launch
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_subject_is_done_by_one_worker(count):
    shares = [Worker(k, count).share(NAMES) for k in range(count)]
    assert sorted(name for share in shares for name in share) == NAMES
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_all_workers_agree_on_slots_that_no_two_subjects_share():
    slots = [slots_of(NAMES, 7, Worker(k, 3)) for k in range(3)]
    assert slots == [{"a": 7, "b": 8, "c": 9, "d": 10, "e": 11}] * 3


def test_a_worker_alone_leaves_slots_to_the_library():
    assert slots_of(NAMES, None, Worker()) is None
    assert slots_of(["a"], 3, Worker()) == {"a": 3}


@pytest.mark.parametrize(
    ("names", "first", "remedy"), [(NAMES, None, "--slot"), (["a", "b"], 0, "start 2 or fewer")]
)
def test_workers_who_cannot_share_the_subjects_say_so(names, first, remedy):
    with pytest.raises(ConfigError, match=remedy):
        slots_of(names, first, Worker(1, 3))


def test_without_a_launcher_there_is_one_worker():
    assert this_worker(2) == Worker(0, 1, 0)


def test_a_launchers_variables_are_read_once_and_hidden_from_libraries(launched):
    launched(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    assert this_worker(2) == Worker(5, 8, 1)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    assert this_worker(2) == Worker()


def test_variables_that_are_no_numbers_are_refused(launched):
    launched(RANK="first", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="RANK"):
        this_worker(2)


def test_workers_take_the_gpus_of_their_machine_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Worker(k + 4, 8, k).device(None) for k in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Worker(3, 8, 3).device("cuda") == "cuda:1"
    assert Worker(3, 8, 3).device("cpu") == "cpu"
    assert Worker().device(None) is None


def test_one_command_under_a_launcher_trains_each_concept_once_in_its_own_slot(tmp_path):
    names = ("plushbear", "baseballcap", "toytrain")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    train = [
        "sbora_diffusion", "train", *(str(CONCEPTS / name) for name in names), "--slot", "4",
        "--device", "cpu", "-o", str(tmp_path / "out"), "--library", str(tmp_path / "l.sqlite3"),
        "--steps", "1", "-s", "batch_size=1", "-s", "copies=1", "-s", "targets=text-encoder",
        "-s", "preservation=0", "-s", "resolution=32",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *train], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "out" / f"{name}.safetensors" for name in names]
    assert [read_concept(file).meta.slot for file in files] == [4, 5, 6]
    known = Library(tmp_path / "l.sqlite3").concepts()
    assert {entry.name: entry.path for entry in known} == {
        name: str(file) for name, file in zip(names, files, strict=True)
    }
