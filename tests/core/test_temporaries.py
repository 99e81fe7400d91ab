"""What a killed writer left goes with the next writing of the same file, and nothing else does."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.storage import write_atomically, written_together
from sbora_diffusion.core.temporaries import temporary_beside

FORK = get_context("fork")
NAMES = ("robot.safetensors", "[r]*?.safetensors", "x" * 255)


def write_file(place: Path, text: str) -> None:
    write_atomically(place, text.encode())


def write_files(place: Path, text: str) -> None:
    with written_together(
        [(place, text.encode()), (place.with_name(f"of {place.name[:9]}"), b"second")]
    ):
        pass


def write_in_folder(place: Path, text: str) -> None:
    write_folder(place, lambda unfinished: fill(unfinished, text))


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


WRITERS = (write_file, write_files, write_in_folder)


def text_at(place: Path) -> str:
    return (place / "inner" / "file" if place.is_dir() else place).read_text()


def left_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.glob(".sbora-*")}


def writer(
    write: Callable[[Path, str], None], place: Path, before_rename: Callable[[], object]
) -> BaseProcess:
    """A process that writes, and does something else first when all but the name is there."""
    rename = os.replace

    def renamed(*names: object) -> None:
        before_rename()
        rename(*names)

    def run() -> None:
        os.replace = renamed
        write(place, "theirs")

    process = FORK.Process(target=run)
    process.start()
    return process


def kill_in_writing(write: Callable[[Path, str], None], place: Path) -> None:
    process = writer(write, place, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process.join()
    assert process.exitcode == -signal.SIGKILL and not place.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:3])
def test_the_next_writing_removes_what_killed_writers_left_of_it_alone(tmp_path, write, name):
    place, other = tmp_path / name, tmp_path / "other"
    kill_in_writing(write, other)
    of_other = left_in(tmp_path)
    for _ in range(2):
        kill_in_writing(write, place)
    assert of_other and left_in(tmp_path) > of_other
    write(place, "mine")
    assert text_at(place) == "mine" and left_in(tmp_path) & of_other == of_other
    write(other, "mine")
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("write", [write_file, write_files])
def test_a_living_writer_of_the_same_file_is_let_alone(tmp_path, write):
    place, reached, go = tmp_path / "robot.safetensors", FORK.Event(), FORK.Event()
    living = writer(write, place, lambda: (reached.set(), go.wait(60)))
    assert reached.wait(60)
    write(place, "mine")
    assert text_at(place) == "mine" and left_in(tmp_path)
    go.set()
    living.join()
    assert living.exitcode == 0 and text_at(place) == "theirs" and left_in(tmp_path) == set()


def test_what_another_machine_or_a_stranger_left_stays(tmp_path, monkeypatch):
    place = tmp_path / "robot.safetensors"
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    kill_in_writing(write_file, place)
    monkeypatch.undo()
    number = temporary_beside(place).name.removeprefix(f".sbora-{os.getpid()}")
    strange = {f".sbora-{who}{number}" for who in ("", "x", "0", "-1", 10**20)}
    for name in strange:
        (tmp_path / name).write_text("")
    write_file(place, "mine")
    assert left_in(tmp_path) > strange and len(left_in(tmp_path)) == len(strange) + 1


def test_what_cannot_be_removed_hinders_nobody(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    place = tmp_path / "robot.safetensors"
    kill_in_writing(write_file, place)
    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        write_file(place, "mine")
    assert text_at(place) == "mine" and len(left_in(tmp_path)) == 1
