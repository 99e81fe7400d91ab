"""Uploads become concept folders, or one line says why not; the form becomes a command."""

import re

import pytest
from PIL import Image

from sbora_diffusion.app.job_store import JobStore
from sbora_diffusion.app.subjects import (
    delete_subject,
    find_subjects,
    save_subject,
    usable,
)
from sbora_diffusion.app.training_form import changed, form, submit_training
from sbora_diffusion.app.workspace import Handout, Workspaces
from sbora_diffusion.core.errors import ConfigError, ConflictError, DataError, SboraError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from tests.reliability.test_hostile_names import NAMES, places

MUG = {"name": "mug", "class_noun": "mug"}


@pytest.fixture
def workspace(tmp_path):
    return Workspaces(tmp_path / "home" / "library.sqlite3").of(None)


@pytest.fixture
def pictures(tmp_path):
    files = [tmp_path / f"upload {k}.png" for k in range(2)]
    for file in files:
        image = Image.new("RGB", (64, 48), "red")
        exif = Image.Exif()
        exif[0x10F], exif[0x0112] = "a camera", 6
        image.save(file, exif=exif)
    return files


def test_uploads_become_a_folder_that_train_takes(workspace, pictures):
    folder = save_subject(
        workspace, {**MUG, "licence": 'mine "own"\\'}, pictures, {str(pictures[1]): " on a desk "}
    )
    subject = read_subject(folder)
    assert subject.settings.token == "<mug>" and subject.settings.licence == 'mine "own"\\'
    assert [subject.caption(image) for image in subject.images] == [None, "<mug>, on a desk"]
    with Image.open(subject.images[0]) as kept:
        assert kept.size == (48, 64) and not kept.getexif()  # upright, and no camera any more
    assert list(find_subjects(workspace)) == ["mug"]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "a\n"], ids=ascii)
def test_no_name_leads_out_of_the_folder(workspace, pictures, name):
    before = places(workspace.folder.parent.parent)
    with pytest.raises(SboraError):
        save_subject(workspace, {**MUG, "name": name}, pictures, {})
    assert places(workspace.folder.parent.parent) == before


@pytest.mark.parametrize(
    ("facts", "count", "error", "words"),
    [
        ({"name": ""}, 2, ConfigError, "has no name"),
        ({"class_noun": " "}, 2, ConfigError, "has no class word"),
        ({"token": "mug"}, 2, ConfigError, "token"),
        ({}, 0, DataError, "1 to 40 pictures, here are 0"),
        ({}, 41, DataError, "here are 41"),
    ],
)
def test_what_is_missing_is_one_clear_line(workspace, pictures, facts, count, error, words):
    with pytest.raises(error, match=re.escape(words)):
        save_subject(workspace, {**MUG, **facts}, (pictures * 21)[:count], {})
    assert not list(workspace.folder.glob("subjects/*"))


def test_a_concept_is_never_replaced_silently(workspace, pictures):
    folder = save_subject(workspace, MUG, pictures, {})
    before = places(folder)
    with pytest.raises(ConflictError, match="already"):
        save_subject(workspace, MUG, pictures[:1], {})
    assert places(folder) == before
    delete_subject(workspace, "mug")
    with pytest.raises(ConfigError):
        delete_subject(workspace, "../subjects")
    assert find_subjects(workspace) == {}


def test_one_bad_picture_leaves_nothing_behind_and_is_called_by_its_own_name(workspace, pictures):
    bad = pictures[0].with_name("page.png")
    bad.write_text("<html>")
    with pytest.raises(DataError, match=r"^page\.png is not a picture"):
        save_subject(workspace, MUG, [*pictures, bad], {})
    assert not list(workspace.subjects.iterdir())
    assert usable([bad, *pictures])[0] == pictures


def test_people_have_workspaces_of_their_own(tmp_path):
    library = tmp_path / "library.sqlite3"
    both = Workspaces(library, people=["ada", "bob"])
    ada, bob = both.of("ada"), both.of("bob")
    assert ada.library.path != bob.library.path and ada.folder != bob.folder
    assert not ada.folder.is_relative_to(bob.folder)
    alone = Workspaces(library, people=["ada"])
    assert alone.of("ada").library.path == library and len(list(alone)) == 1
    with pytest.raises(ConfigError, match="login"):
        Workspaces(library, people=["ada", "../bob"])


def test_the_form_has_every_field_of_the_schema_once():
    names = [field.name for fields in form().values() for field in fields]
    assert sorted(names) == sorted(TrainConfig.model_fields)
    fields = {field.name: field for fields in form().values() for field in fields}
    assert fields["variant"].choices == ("fa", "fb") and fields["flip"].kind == "switch"
    assert fields["rank"].whole and not fields["rate_unet"].whole
    assert fields["alpha"].optional and not fields["rank"].optional


def test_a_form_that_nobody_touched_is_the_recipe():
    untouched = {field.name: field.default for fields in form().values() for field in fields}
    assert changed(untouched) == {}
    assert changed({**untouched, "alpha": "4", "steps": 30}) == {"alpha": 4.0, "steps": 30}
    with pytest.raises(ConfigError, match="rank"):
        changed({**untouched, "rank": 0})


def test_training_is_the_command_that_a_person_would_type(workspace, pictures):
    save_subject(workspace, MUG, pictures, {})
    store = JobStore(workspace.jobs)
    job = submit_training(workspace, store, "mug", {"steps": 30, "flip": False}, 10)
    assert job.command == (
        f"sbora train {workspace.subjects / 'mug'} -s steps=30 -s flip=false --sample-every 10 "
        f"--library {workspace.library.path} -o {workspace.concepts / 'mug.safetensors'}"
    )
    with pytest.raises(ConfigError, match="already"):
        submit_training(workspace, store, "mug", {}, 0)
    with pytest.raises(ConfigError, match="nothing to train"):
        submit_training(workspace, store, "../mug", {}, 0)


def test_what_is_handed_out_lies_where_nobody_can_guess(tmp_path):
    handout = Handout()
    (tmp_path / "a.txt").write_text("a")
    places = [handout.copy(tmp_path / "a.txt") for _ in range(2)]
    assert places[0] != places[1] and places[0].read_text() == "a"
    assert handout.copy(tmp_path).suffix == ".zip"
