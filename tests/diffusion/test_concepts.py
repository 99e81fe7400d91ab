"""A concept folder is read, or refused in one line that says what to do."""

import pytest
from PIL import Image

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.diffusion.concepts import read_subject

GOOD = 'name = "robot"\nclass_noun = "toy robot"\ntoken = "<robot>"\n'


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.JPG")
    (tmp_path / "concept.toml").write_text(GOOD)
    return tmp_path


def refusal(folder, kind):
    with pytest.raises(kind) as caught:
        read_subject(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_settings_and_pictures_in_the_order_of_their_names(folder):
    subject = read_subject(folder)
    assert subject.settings.token == "<robot>" and subject.settings.class_noun == "toy robot"
    assert [path.name for path in subject.images] == ["a.JPG", "b.png"]


def test_hidden_files_and_other_files_are_no_pictures(folder):
    (folder / "._a.JPG").write_bytes(b"notes of a file manager")
    (folder / "notes.md").write_text("x")
    assert len(read_subject(folder).images) == 2


def test_without_a_name_the_folder_gives_it(folder):
    (folder / "concept.toml").write_text(GOOD.replace('name = "robot"\n', ""))
    named = folder.rename(folder.parent / "tin-man")
    assert read_subject(named).settings.name == "tin-man"


def test_an_unknown_key_names_the_nearest_known_one(folder):
    (folder / "concept.toml").write_text(GOOD + 'class_nuon = "x"\n')
    message = refusal(folder, ConfigError)
    assert "unknown key 'class_nuon'" in message and "did you mean 'class_noun'?" in message
    assert "concept.toml" in message


def test_a_missing_token_says_what_to_add(folder):
    (folder / "concept.toml").write_text(GOOD.replace('token = "<robot>"\n', ""))
    assert "key 'token' is missing; add token" in refusal(folder, ConfigError)


@pytest.mark.parametrize(
    "token", ["robot", "<Robot>", "<a robot>", "<>", "<a>b>", "<é>", "<" + "a" * 63 + ">"]
)
def test_a_token_of_the_wrong_form_is_refused(folder, token):
    (folder / "concept.toml").write_text(GOOD.replace("<robot>", token))
    message = refusal(folder, ConfigError)
    assert "token" in message and repr(token) in message


@pytest.mark.parametrize("noun", ["", "   ", "a\\nb", "a" * 201])
def test_a_class_noun_that_no_concept_file_can_hold_is_refused(folder, noun):
    (folder / "concept.toml").write_text(GOOD.replace("toy robot", noun))
    assert "class_noun" in refusal(folder, ConfigError)


@pytest.mark.parametrize("name", ["../robot", "a b", ".robot", "", "a" * 65])
def test_a_name_that_is_no_file_name_is_refused(folder, name):
    (folder / "concept.toml").write_text(GOOD.replace('"robot"', f'"{name}"'))
    assert "name" in refusal(folder, ConfigError)


def test_a_folder_without_pictures_says_what_to_add(folder):
    for path in (folder / "a.JPG", folder / "b.png"):
        path.unlink()
    message = refusal(folder, DataError)
    assert "no reference images" in message and ".png" in message


def test_a_missing_folder_and_a_file_in_its_place_are_named(folder):
    assert "nowhere does not exist" in refusal(folder / "nowhere", DataError)
    assert "concept.toml" in refusal(folder / "concept.toml", DataError)


def test_a_folder_without_concept_toml_is_refused(folder):
    (folder / "concept.toml").unlink()
    assert "concept.toml cannot be read" in refusal(folder, ConfigError)


@pytest.mark.parametrize("content", [b"not toml at all", b"\xff\xfe\x00", b"name = \n"])
def test_what_is_not_toml_is_refused(folder, content):
    (folder / "concept.toml").write_bytes(content)
    assert "not valid TOML" in refusal(folder, ConfigError)


def test_the_examples_that_ship_can_all_be_read(pytestconfig):
    folders = sorted(path.parent for path in pytestconfig.rootpath.glob("concepts/*/concept.toml"))
    subjects = [read_subject(folder) for folder in folders]
    assert len(subjects) >= 14 and all(len(s.images) >= 5 for s in subjects)
    assert len({s.settings.token for s in subjects}) == len(subjects)
