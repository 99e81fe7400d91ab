"""`sbora generate`: concepts found by their tokens, and regions."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sbora_diffusion import cli
from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.concept_set import write_concept_set
from sbora_diffusion.core.schema import Concept, TokenMeta
from sbora_diffusion.diffusion import bases
from sbora_diffusion.diffusion.bases import POCKET
from sbora_diffusion.library import Library
from tests.diffusion.lora_examples import concept_for
from tests.diffusion.thin_families import NAMES, thin_family
from tests.test_cli import refused

QUICK = ("--steps", 1, "--guidance", 1, "--json")
CAP_AND_BEAR = "a <baseballcap> next to a <PlushBear>"


@pytest.fixture
def sbora(pocket, monkeypatch, capsys, tmp_path):
    """Run `sbora generate` in an empty folder with an empty library: (status, stdout, stderr)."""
    monkeypatch.setattr(bases, "load_base", lambda *_: copy.copy(pocket))
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    original = pocket.pipeline
    monkeypatch.setattr(pocket, "pipeline", copy.deepcopy(original))

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", *map(str, arguments)])
        monkeypatch.setattr(pocket, "pipeline", copy.deepcopy(original))
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def shelve(pocket, tmp_path):
    """Put a copy of an example into the library, with another token or base."""

    def put(example: str, name: str, token: str, base: str | None = None) -> Path:
        concept = read_concept(POCKET / "examples" / f"{example}.safetensors")
        tokens = (TokenMeta(token=token, initializer=concept.meta.tokens[0].initializer),)
        meta = concept.meta.model_copy(update={"name": name, "tokens": tokens})
        (vectors,) = concept.embeddings.values()
        path = tmp_path / f"{name}.safetensors"
        renamed = Concept(meta, concept.layers, {f"text_encoder.{token}": vectors})
        digest = write_concept(path, renamed)
        library, key = Library(), base or pocket.key
        got = library.reserve(key, meta.variant, name, meta.rank, meta.widths, meta.slot)
        if got.registered:  # not if another concept has this slot
            library.record(key, meta.variant, name, path, digest, token)
        return path

    return put


def active(outcome) -> list[str]:
    status, out, err = outcome
    assert status == 0, err
    return [concept["name"] for concept in json.loads(out)["pictures"][0]["concepts"]]


def test_concepts_of_the_library_are_found_by_their_tokens_and_named(sbora, shelve):
    bear = shelve("plushbear", "mybear", "<bear>")
    outcome = sbora("a <BEAR> on grass", *QUICK)
    assert active(outcome) == ["mybear"]
    assert f"<bear> is {bear}" in outcome[2] and "warning" not in outcome[2]
    assert active(sbora("a bear on grass", *QUICK)) == []


def test_shipped_examples_are_found_unless_the_library_has_their_token(sbora, shelve):
    assert active(sbora(CAP_AND_BEAR, *QUICK)) == ["baseballcap", "plushbear"]
    shelve("plushbear", "mine", "<plushbear>")
    assert active(sbora(CAP_AND_BEAR, *QUICK)) == ["baseballcap", "mine"]


def test_a_concept_given_by_hand_comes_before_the_library(sbora, shelve, tmp_path):
    bear = shutil.copy(shelve("plushbear", "mine", "<bear>"), tmp_path / "given.safetensors")
    outcome = sbora("a <bear>", "--concept", f"{bear}:0.5", *QUICK)
    (concept,) = json.loads(outcome[1])["pictures"][0]["concepts"]
    assert (concept["name"], concept["weight"]) == ("mine", 0.5)


def test_a_concept_set_keeps_its_weights_and_its_permission_to_overlap(sbora, shelve, tmp_path):
    files = shelve("plushbear", "bear", "<bear>"), shelve("plushbear", "twin", "<twin>")
    pairs = [(read_concept(file), 0.5) for file in files]
    assert refused(sbora("a <bear>", "--concept", files[0], "--concept", files[1]), "share")
    together = tmp_path / "set.safetensors"
    write_concept_set(together, pairs, allow_overlap=True)
    status, out, err = sbora("a <bear> and its <twin>", "--concept", f"{together}:0.5", *QUICK)
    assert status == 0, err
    drawn = json.loads(out)["pictures"][0]["concepts"]
    assert {c["name"]: c["weight"] for c in drawn} == {"bear": 0.25, "twin": 0.25}


def test_a_token_that_nobody_knows_warns_with_the_nearest_one(sbora, shelve):
    shelve("plushbear", "elsewhere", "<robot>", base="sd1-0123456789ab")
    outcome = sbora("a <plushbaer>, a <robot> and a <zebra>", *QUICK)
    assert active(outcome) == []
    lines = [line for line in outcome[2].splitlines() if line.startswith("warning: no concept")]
    assert len(lines) == 3 == len(json.loads(outcome[1])["warnings"])
    assert "<plushbaer>; did you mean <plushbear>?" in lines[0]
    assert "<robot>; the library has it for another base, sd1-0123456789ab" in lines[1]
    assert "<zebra>; give its file with --concept" in lines[2]


def test_what_a_prompt_names_but_cannot_be_used_is_one_clear_line(sbora, shelve):
    lost = shelve("plushbear", "lost", "<lost>")
    shelve("trex", "first", "<twice>")
    shelve("baseballcap", "second", "<twice>")
    lost.unlink()
    assert refused(sbora("a <lost>"), "'lost'", "is missing")
    assert refused(sbora("a <twice>"), "<twice> is the token of", "--concept")
    assert not any(Path.cwd().iterdir())


def test_regions_are_drawn_and_noted_in_the_picture(sbora):
    halves = ("--region", "baseballcap=0,0,.5,1", "--region", "plushbear=.5,0,1,1")
    pictures = {}
    for name, options in (("half", halves), ("auto", ("--auto-regions",))):
        status, out, err = sbora(CAP_AND_BEAR, *options, *QUICK, "-o", f"{name}.png")
        assert status == 0, err
        with Image.open(f"{name}.png") as picture:
            pictures[name] = picture.tobytes()
            made = json.loads(picture.text["sbora"])
        assert json.loads(out)["pictures"][0].items() <= made.items()
        noted = {"baseballcap": [0, 0, 0.5, 1], "plushbear": [0.5, 0, 1, 1]}
        assert made["regions"] == {"half": noted, "auto": "auto"}[name]
    assert pictures["half"] != pictures["auto"]


def test_a_picture_has_the_size_that_was_asked_for_and_notes_it(sbora):
    status, _, err = sbora("a dog", "--width", 96, *QUICK, "-o", "wide.png")
    assert status == 0, err
    with Image.open("wide.png") as picture:
        assert picture.size == (96, 128)
        made = json.loads(picture.text["sbora"])
    assert (made["width"], made["height"]) == (96, 128)
    assert refused(sbora("a dog", "--height", 90, *QUICK), "multiple of 8", "take 88")


def test_no_picture_replaces_another(sbora, monkeypatch):
    for files in (["picture.png"], ["picture_2.png"]):
        assert json.loads(sbora("a bear", *QUICK)[1])["files"] == files
    several = ("a bear", *QUICK, "--num", 2)
    assert json.loads(sbora(*several)[1])["files"] == ["picture_000.png", "picture_001.png"]
    assert json.loads(sbora(*several)[1])["files"] == ["picture_2_000.png", "picture_2_001.png"]
    before = {path.name: path.read_bytes() for path in Path.cwd().iterdir()}
    assert len(before) == 6
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("work began"))
    assert refused(sbora("a bear", "-o", "picture.png"), "picture.png exists", "another --output")
    assert refused(sbora(*several, "-o", "picture.png"), "picture_000.png exists")
    Path("link.png").symlink_to("nowhere.png")
    assert refused(sbora("a bear", "-o", "link.png"), "link.png exists")
    Path("link.png").unlink()
    assert {path.name: path.read_bytes() for path in Path.cwd().iterdir()} == before


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (CAP_AND_BEAR, ["--region", "plushbear=0,0,1.5,1"], ["0 ≤ x0 < x1 ≤ 1", "0,0,1.5,1"]),
        (CAP_AND_BEAR, ["--region", "plushbear=0.5,0,0.5,1"], ["0 ≤ x0 < x1 ≤ 1"]),
        (CAP_AND_BEAR, ["--region", "plushbear"], ["NAME=x0,y0,x1,y1"]),
        (CAP_AND_BEAR, ["--region", "bear=0,0,1,1"], ["'bear' is not", "'plushbear'"]),
        (CAP_AND_BEAR, ["--region", "plushbear=0,0,1,1"], ["'baseballcap' has no region"]),
        (CAP_AND_BEAR, ["--region", "a=0,0,1,1", "--region", "a=0,0,1,1"], ["'a' has two"]),
        (CAP_AND_BEAR, ["--region", "a=0,0,1,1", "--auto-regions"], ["exclude each other"]),
        ("a cap", ["--auto-regions"], ["needs a concept"]),
    ],
)
def test_wrong_regions_are_refused_in_one_line(sbora, prompt, options, words):
    assert refused(sbora(prompt, *options), *words)


def test_a_region_for_a_concept_that_the_prompt_does_not_name_is_refused(sbora):
    bear = POCKET / "examples" / "plushbear.safetensors"
    status, out, err = sbora("a bear", "--concept", bear, "--region", "plushbear=0,0,1,1")
    warning, error = err.splitlines()
    assert (status, out) == (2, "") and warning.startswith("warning: ")
    assert error.startswith("error: ") and "does not mention <plushbear>" in error


@pytest.mark.parametrize("family", NAMES)
def test_every_family_draws_with_its_concepts(sbora, pocket, family, monkeypatch, tmp_path):
    base = thin_family(family, pocket)
    monkeypatch.setattr(bases, "load_base", lambda *_: base)
    write_concept(tmp_path / "mug.safetensors", concept_for(base.pipeline, "mug", family))
    command = ("a <mug> in the rain", "--concept", tmp_path / "mug.safetensors", "--base", "thin")
    status, out, said = sbora(*command, *QUICK, "-o", "mug.png")
    assert (status, said) == (0, "mug.png\n")
    (picture,) = json.loads(out)["pictures"]
    assert [concept["name"] for concept in picture["concepts"]] == ["mug"]
    with Image.open("mug.png") as drawn:
        assert drawn.size == (32, 32)
