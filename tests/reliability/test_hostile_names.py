"""Names that lead elsewhere: nothing is written outside the folder or over another file."""

import os
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from sbora_diffusion.core.concept import sealed, write_concept
from sbora_diffusion.core.concept_set import write_concept_set
from sbora_diffusion.core.errors import SboraError
from sbora_diffusion.core.renaming import renamed
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.formats import write_lora
from sbora_diffusion.outputs import check_picture_output
from sbora_diffusion.pictures import save_png
from tests.core.concept_examples import make_concept

NAMES = [
    *("../up", "..", ".", "/abs", "a/b", "a\\b", "..\\up", "C:\\x", "a\0b", "%2e%2e%2fup", "a%00"),
    *("a" * 300, "\u202egnp.exe", "e\u0301", "\u00e9", "\u05d0\u05d1", "\uff0e\uff0e\uff0fup"),
    *("", " ", "a b", ".hidden", "-rf", "a\nb", "a\n", "a.", "\U0001f600", "~", "$HOME", "a:b"),
]
WORD = 'class_noun = "toy"\ntoken = "<toy>"\n'


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_of_a_concept_leads_elsewhere(tmp_path, name, record_property):
    with pytest.raises(ValidationError):
        make_concept(name, tokens=())
    with pytest.raises(SboraError):
        renamed(sealed(make_concept()), {}, name)
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    quoted = "".join(f"\\U{ord(c):08x}" for c in name)
    (folder / "concept.toml").write_text(f'name = "{quoted}"\n{WORD}', encoding="utf-8")
    with pytest.raises(SboraError):
        read_subject(folder)
    record_property("18 names refused", 1)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "-rf"], ids=ascii)
def test_no_token_leads_elsewhere(name, record_property):
    with pytest.raises(SboraError):
        renamed(sealed(make_concept()), tokens={"<robot>": f"<{name}>"})
    record_property("18 tokens refused", 1)


def places(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", ["to a file", "dangling"])
def test_an_output_that_is_a_link_is_replaced_and_not_followed(tmp_path, kind, record_property):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    target = outside / "mine"
    if kind == "to a file":
        target.write_bytes(b"mine")
    before = places(outside)
    pair = [(sealed(make_concept()), 1.0)]
    for number, write in enumerate(
        (lambda p: write_concept(p, pair[0][0]), lambda p: write_concept_set(p, pair))
    ):
        link = inside / str(number)
        link.symlink_to(target)
        write(link)
        assert not link.is_symlink() and places(outside) == before
    folder = inside / "folder"
    folder.symlink_to(outside if kind == "to a file" else target)
    with pytest.raises(SboraError):
        write_lora(folder, pair)
    assert places(outside) == before
    record_property("18 links not followed", 3)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "a" * 250 + ".safetensors"], ids=ascii)
def test_a_file_name_that_cannot_be_is_one_typed_error(tmp_path, name):
    with pytest.raises(SboraError) as caught:
        write_concept(tmp_path / name, make_concept())
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_commands_refuse_to_overwrite_what_they_did_not_write(sbora, tiny_concepts, tmp_path):
    bear = tiny_concepts["plushbear"]
    for name in ("a.safetensors", "b.txt"):
        (tmp_path / name).write_bytes(b"mine")
    for output in ("a.safetensors", "b.txt"):
        status, _, err = sbora("merge", bear, "-o", tmp_path / output, "--as", "set")
        assert status == 2 and err.count("\n") == 1
    assert set(places(tmp_path).values()) == {b"mine"}


def test_plots_and_sheets_replace_only_what_a_command_drew(sbora, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_bytes(b"mine")
    before = places(tmp_path)
    for name in before:
        place = tmp_path / name
        for command in (("library", "list", "--plot", place), ("evaluate", tmp_path, "-o", place)):
            status, _, err = sbora(*command)
            assert status == 2 and "was not drawn by sbora" in err and err.count("\n") == 1
    assert places(tmp_path) == before
    save_png(Image.new("RGB", (8, 8)), tmp_path / "own.png", {"prompt": "a"})
    check_picture_output(tmp_path / "own.png")


def test_links_in_a_subjects_folder_are_read_and_never_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "concept.toml").write_text(WORD)
    os.symlink(secret, folder / "a.png")
    os.symlink(folder, folder / "loop.png")
    before = places(tmp_path)
    with pytest.raises(SboraError):
        from sbora_diffusion.diffusion.dataset import load_examples

        load_examples(read_subject(folder), 32, 1, False, 0)
    assert places(tmp_path) == before
