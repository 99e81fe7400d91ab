import copy
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from sbora_diffusion import cli
from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.schema import Concept
from sbora_diffusion.diffusion import bases
from tests.conftest import CONCEPTS

TINY = (
    "-s", "copies=1", "-s", "batch_size=1", "-s", "resolution=64", "-s", "preservation=0",
    "--steps", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_base(pocket, monkeypatch, tmp_path):
    """Every command gets its own copy of the pocket base, and a fresh library and folder."""
    monkeypatch.setattr(bases, "load_base", lambda *_: copy.deepcopy(pocket))
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def folder(tmp_path):
    """A good concept folder, to be spoilt."""
    return shutil.copytree(CONCEPTS / "plushbear", tmp_path / "plushbear")


def refused(outcome, *words):
    """One line on stderr with these words, nothing on stdout, exit status 2."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    return True


def is_empty(path):
    return not any(path.iterdir())


def test_wrong_folders_are_refused_in_one_line_and_leave_nothing(sbora, folder, tmp_path):
    here = tmp_path / "here"
    settings = folder / "concept.toml"
    good = settings.read_text()

    settings.write_text(good + 'clas_noun = "bear"\n')
    assert refused(sbora("train", folder), "clas_noun", "did you mean 'class_noun'")
    settings.write_text("\n".join(x for x in good.splitlines() if not x.startswith("token")))
    assert refused(sbora("train", folder), "'token' is missing")
    settings.write_text(good)
    (folder / "06.jpg").write_text("not a picture")
    assert refused(sbora("train", folder, *TINY), "06.jpg", "not a picture")
    for picture in folder.glob("*.jpg"):
        picture.unlink()
    assert refused(sbora("train", folder), "no reference images")
    assert refused(sbora("train", tmp_path / "nowhere"), "does not exist")
    assert is_empty(here)


def test_a_failed_training_gives_its_slot_back(sbora, folder):
    (folder / "06.jpg").write_text("not a picture")
    assert refused(sbora("train", folder, *TINY))
    _, out, _ = sbora("library", "list", "--json")
    assert json.loads(out)["concepts"] == []


def test_wrong_settings_are_refused_in_one_line(sbora, folder, tmp_path):
    assert refused(sbora("train", folder, "--rank", 200), "rank 200", "160 wide")
    assert refused(sbora("train", folder, "--slot", 20), "slot 20", "20 concepts")
    assert refused(sbora("train", folder, "-s", "stepz=3"), "stepz", "did you mean 'steps'")
    assert refused(sbora("train", folder, "-s", "steps"), "key=value")
    assert refused(sbora("train", folder, "--variant", "fc"), "variant")
    assert refused(sbora("train", folder, "--config", tmp_path / "none.toml"), "none.toml")
    assert refused(sbora("train", folder, "--dtype", "fp8"), "--dtype")
    assert refused(sbora("train"), "folder")
    assert refused(sbora("fly"), "fly")
    assert refused(sbora("generate", "a", "--num", 0), "num")
    assert is_empty(tmp_path / "here")


def test_outputs_that_cannot_be_written_are_refused_before_any_work(sbora, folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("keep me")
    foreign = tmp_path / "other.safetensors"
    foreign.write_text("keep me too")
    assert refused(sbora("train", folder, "-o", blocked / "x.safetensors"), "cannot be written")
    assert refused(sbora("train", folder, "-o", "x.ckpt"), ".safetensors")
    assert refused(sbora("train", folder, "-o", foreign), "is not a concept file")
    assert refused(sbora("train", folder, "--library", blocked / "x"), "library", "cannot be used")
    assert refused(sbora("generate", "a", "-o", blocked / "x.png"), "cannot be written")
    assert refused(sbora("generate", "a", "-o", "x.jpg"), ".png")
    assert blocked.read_text() == "keep me" and foreign.read_text() == "keep me too"


def test_merging_refuses_what_cannot_live_together(sbora, tiny_concepts, tmp_path):
    bear, cap = tiny_concepts.values()
    blocked = tmp_path / "file"
    blocked.write_text("")
    clash = tmp_path / "clash.safetensors"
    first, second = read_concept(bear), read_concept(cap)
    renamed = first.meta.model_copy(update={"name": "double", "tokens": second.meta.tokens})
    embeddings = dict(second.embeddings)
    write_concept(clash, Concept(renamed, first.layers, embeddings))

    assert refused(sbora("merge", bear, clash, "-o", "m"), "share", "--allow-overlap")
    assert refused(sbora("merge", bear, bear, "-o", "m"), "'plushbear'")
    assert refused(sbora("merge", bear, cap, "-o", "m", "--as", "zip"), "--as", "lora")
    assert refused(sbora("merge", bear, cap, "-o", blocked / "m"), "cannot be written")
    assert refused(sbora("merge", bear, cap, "-o", tmp_path), "not empty")
    assert refused(sbora("merge", f"{bear}:heavy", cap, "-o", "m"), "not a number")
    assert is_empty(tmp_path / "here")


def test_a_concept_of_another_base_is_refused(sbora, pocket, tiny_concepts, tmp_path):
    bear = tiny_concepts["plushbear"]
    concept = read_concept(bear)
    layer = min(concept.layers)
    digests = {**concept.meta.fingerprint, layer: "0" * 48}
    foreign = tmp_path / "foreign.safetensors"
    meta = concept.meta.model_copy(update={"fingerprint": digests})
    write_concept(foreign, Concept(meta, concept.layers, concept.embeddings))

    assert refused(sbora("generate", "a", "--concept", foreign), "not the base", layer)
    assert refused(sbora("merge", foreign, "-o", "m"), "not the base", layer)
    assert refused(sbora("library", "add", foreign), "not the base", layer)
    assert is_empty(tmp_path / "here")


def test_several_subjects_train_at_once_into_a_folder(sbora, tmp_path):
    folders = [CONCEPTS / name for name in ("toytrain", "plushbear")]
    arguments = (*folders, *TINY, "-s", "targets=text-encoder", "--at-once", 2)
    status, out, err = sbora("train", *arguments, "-o", "new", "--json")
    assert status == 0 and "2 subjects, 2 at once" in err and err.count("next: sbora") == 2
    document = json.loads(out)
    assert [(c["name"], c["slot"]) for c in document["concepts"]] == [
        ("toytrain", 0),
        ("plushbear", 1),
    ]
    for entry in document["concepts"]:
        assert read_concept(entry["file"]).meta.digest == entry["digest"]
    assert document["training"]["steps"] == 1
    status, out, err = sbora("train", *arguments, "-o", "slots", "--slot", 4, "--json")
    assert [c["slot"] for c in json.loads(out)["concepts"]] == [4, 5]
    assert refused(sbora("train", *arguments, "--sample-every", 1), "for one subject")
    assert refused(sbora("train", *arguments, "-o", "x.safetensors"), "no folder")
    assert refused(sbora("train", *arguments, "-s", "dropout=0.5"), "--at-once", "dropout")
    assert refused(sbora("train", folders[0], folders[0], *TINY), "two subjects", "toytrain")


def test_training_twice_gives_the_same_bytes_and_keeps_the_slot(sbora, tmp_path):
    status, out, err = sbora("train", CONCEPTS / "plushbear", *TINY, "--json")
    assert status == 0
    first = json.loads(out)
    assert "adapted 72 of 72 attention layers" in err
    data = (tmp_path / "here" / "plushbear.safetensors").read_bytes()
    other = json.loads(sbora("train", CONCEPTS / "baseballcap", *TINY, "--json")[1])
    repeat = sbora("train", CONCEPTS / "plushbear", *TINY, "--json", "-o", "b.safetensors")
    again = json.loads(repeat[1])
    assert again["warnings"] == []
    assert (first["slot"], other["slot"], again["slot"]) == (0, 1, 0)
    assert (tmp_path / "here" / "b.safetensors").read_bytes() == data
    assert str(tmp_path).encode() not in data

    out = sbora("train", CONCEPTS / "siamese", *TINY, "--slot", 1, "-o", "b.safetensors")
    assert out[0] == 0 and "warning: slot 1 belongs to another concept" in out[2]
    assert "warning: b.safetensors exists and is replaced" in out[2]
    listed = json.loads(sbora("library", "list", "--json")[1])["concepts"]
    assert [(entry["name"], entry["slot"]) for entry in listed] == [
        ("plushbear", 0),
        ("baseballcap", 1),
    ]


def test_generate_draws_the_same_pixels_and_says_how(sbora, tiny_concepts, tmp_path):
    bear = tiny_concepts["plushbear"]
    prompt = "a photo of <plushbear> on the beach"
    command = ("generate", prompt, "--concept", f"{bear}:0.5", "--steps", 1, "--json")
    outcomes = [sbora(*command, "-o", output) for output in ("a.png", "b.png")]
    assert [(status, err) for status, _, err in outcomes] == [(0, "a.png\n"), (0, "b.png\n")]
    assert json.loads(outcomes[0][1])["files"] == ["a.png"]
    assert (tmp_path / "here/a.png").read_bytes() == (tmp_path / "here/b.png").read_bytes()
    with Image.open("a.png") as picture:
        assert picture.text["parameters"].startswith(prompt + "\nSteps: 1, CFG scale: 4.0, Seed: 0")
        made = json.loads(picture.text["sbora"])
    assert made["concepts"] == [
        {"name": "plushbear", "digest": read_concept(bear).meta.digest, "weight": 0.5}
    ]
    assert str(tmp_path).encode() not in (tmp_path / "here/a.png").read_bytes()


def test_a_prompt_that_misses_its_concept_or_is_too_long_only_warns(sbora, tiny_concepts):
    bear = tiny_concepts["plushbear"]
    prompt = "a bear " + "very " * 75 + "happy"
    outcome = sbora("generate", prompt, "--concept", bear, "--steps", 1, "--num", 2)
    status, out, err = outcome
    assert (status, out.split()) == (0, ["picture_000.png", "picture_001.png"])
    first, second = err.splitlines()
    assert first.startswith("warning: ") and "<plushbear>" in first
    assert second.startswith("warning: ") and second.endswith("very happy'")


def test_merge_finds_concepts_by_name_until_they_are_removed(
    sbora, tiny_concepts, monkeypatch, tmp_path
):
    monkeypatch.setattr("sbora_diffusion.lookup.EXAMPLES", tmp_path)  # they have the same names
    for file in tiny_concepts.values():
        assert sbora("library", "add", file)[0] == 0
    pair = ("plushbear", "baseballcap:0.5")
    outcome = sbora("merge", *pair, "-o", "deep/m", "--no-calibrate", "--json")
    status, out, _ = outcome
    assert status == 0
    assert json.loads(out)["concepts"] == [
        {"name": "plushbear", "weight": 1.0},
        {"name": "baseballcap", "weight": 0.5},
    ]
    assert sbora("library", "remove", "plushbear")[0] == 0
    assert refused(sbora("merge", "plushbear", "-o", "n"), "neither a concept file nor the name")
    assert refused(sbora("merge", "basebalcap", "-o", "n"), "did you mean 'baseballcap'")


def test_inspect_and_show_say_what_a_file_is(sbora, tiny_concepts):
    cap = tiny_concepts["baseballcap"]
    status, out, _ = sbora("inspect", cap, "--json")
    facts = json.loads(out)
    expected = {
        "name": "baseballcap",
        "variant": "fa",
        "rank": 8,
        "slot": 1,
        "start": 8,
        "stop": 16,
    }
    assert status == 0 and facts.items() >= expected.items()
    assert facts["bytes"] == cap.stat().st_size and facts["layers"] == 72
    assert "<baseballcap>" in sbora("inspect", cap)[1]
    sbora("library", "add", cap)
    assert json.loads(sbora("library", "show", "baseballcap", "--json")[1])["path"] == str(cap)
    assert refused(sbora("inspect", __file__), "not a safetensors file")
    assert refused(sbora("library", "show", "nobody"), "nobody")


def test_faults_end_with_status_1_and_interruption_with_130(sbora, monkeypatch):
    def end_with(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(cli.Library, "concepts", fail)
        return sbora("library", "list")

    status, _, err = end_with(RuntimeError("broken"))
    assert status == 1 and "SBORA_DEBUG=1" in err and "Traceback" not in err
    assert end_with(KeyboardInterrupt())[0] == 130
    assert refused(end_with(PermissionError(13, "Permission denied", "x")), "Permission denied")


def test_help_and_version_need_no_torch():
    code = (
        "import sys\nfrom sbora_diffusion.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
