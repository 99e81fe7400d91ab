"""What the page shows of paths and commands."""

from pathlib import Path

import pytest

from sbora_diffusion.app.shown import shown_command, shown_path
from sbora_diffusion.app.workspace import Workspaces
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.jobs import add_to_library


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A person's home, who works in a folder of it."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("SBORA_LIBRARY", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_paths_are_shown_from_where_the_person_works_or_lives(at_home):
    assert shown_path(at_home / "work" / "a.png") == "a.png"
    assert shown_path(at_home / "b" / "c") == "~/b/c"
    assert shown_path("/elsewhere/d") == "/elsewhere/d"


def test_a_command_can_be_typed_and_leaves_the_usual_library_out(at_home):
    library = at_home / ".local" / "share" / "sbora" / "library.sqlite3"
    words = ["sbora", "check", str(at_home / "my bear"), "a b", "--library"]
    assert shown_command([*words, str(library), "-n"]) == "sbora check ~/'my bear' 'a b' -n"
    other = shown_command([*words, str(at_home / "work" / "o")])
    assert other.endswith("--library o")


def test_concepts_go_by_their_names_where_these_say_enough(tmp_path, tiny_concepts, pocket):
    workspace = Workspaces(tmp_path / "library.sqlite3").of(None)
    assert workspace.specs({"plushbear": 1.0, "trex": 0.5}) == ["plushbear", "trex:0.5"]
    mine = tiny_concepts["plushbear"]
    add_to_library(mine, [read_concept(mine)], pocket, workspace.library)
    assert workspace.specs({"plushbear": 1.0}) == ["plushbear"]
    workspace.library.reserve("other-x", "fa", "plushbear", 8, {"unet.to_k": 160})
    assert workspace.specs({"plushbear": 1.0}) == [f"{mine}:1"]


def test_a_library_in_the_working_folder_serves_commands_that_run_elsewhere(at_home):
    assert Workspaces("my.sqlite3").of(None).library.path == Path.cwd() / "my.sqlite3"
