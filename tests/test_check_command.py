import json
import shutil

import pytest
from PIL import Image

from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.concept_set import read_concept_set, write_concept_set
from sbora_diffusion.core.errors import ResourceError
from sbora_diffusion.core.renaming import renamed
from sbora_diffusion.diffusion import bases
from sbora_diffusion.library import Library
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.test_cli import refused

NAMES = ("fox", "owl", "ray")
QUICK = ("-s", 'prompts=["a {}"]', "-s", "generic=1", "-s", "steps=1")


@pytest.fixture(autouse=True)
def _here(pocket, monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "load_base", lambda *_: pocket)
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory):
    """fox and owl in slots of their own; elk has owl's token and fox's slot; ray is FB."""
    folder = tmp_path_factory.mktemp("concepts")
    for name, variant, slot in (("fox", "fa", 0), ("owl", "fa", 1), ("elk", "fa", 0)):
        strong_concept(pocket, folder, name, variant, slot)
    strong_concept(pocket, folder, "ray", "fb", 0)
    paths = {name: folder / f"{name}.safetensors" for name in ("fox", "owl", "elk", "ray")}
    write_concept(paths["elk"], renamed(read_concept(paths["elk"]), {"<elk>": "<owl>"}))
    return paths


def test_concepts_that_fit_end_with_0_and_show_a_table_and_a_picture(sbora, files, pocket):
    before = snapshot(pocket)
    status, out, err = sbora(
        "check", files["fox"], f"{files['ray']}:0.5", *QUICK, "--plot", "heat.png", "--json"
    )
    assert_untouched(pocket, before)
    assert status == 0, err
    found = json.loads(out)
    assert found["mergeable"] is True
    assert [(f["kind"], f["blocks"]) for f in found["findings"]] == [("mixed", False)]
    assert [c["weight"] for c in found["concepts"]] == [1.0, 0.5]
    crosstalk = found["crosstalk"]
    assert crosstalk["rms"][0][0] == 1 and crosstalk["rms"][0][1] > 0
    assert len(crosstalk["layers"]) == 72 and len(crosstalk["groups"]) == 12
    worst = crosstalk["worst"][0][1]
    assert crosstalk["layers"][worst["layer"]][0][1] == worst["ratio"]
    assert worst["ratio"] == max(matrix[0][1] for matrix in crosstalk["layers"].values())
    for line in (
        "mergeable",
        "loudest other",
        "verdict: merge them",
        "r_a·r_b = 64 entries of a layer, 4608 in all",
    ):
        assert line in err
    assert Image.open("heat.png").width > 100


@pytest.fixture
def predict(sbora):
    """Way of merging → label → disturbance, the whole document, and what was said."""

    def run(*arguments):
        status, out, err = sbora("check", *arguments, *QUICK, "--json")
        assert status == 0, err
        found = json.loads(out)
        ways = {
            way: {
                one["concept"]: one["disturbance"] for one in found["prediction"][way]["concepts"]
            }
            for way in found["prediction"]
        }
        return ways, found, err

    return run


def test_the_prediction_says_what_each_way_of_merging_changes_for_each_concept(predict, files):
    ways, found, err = predict(files["fox"], files["owl"])
    assert ways.keys() == {"calibrated", "added"}
    for label in ("fox", "owl"):
        assert 0 < ways["calibrated"][label] < ways["added"][label]
    calibrated, added = (found["prediction"][way] for way in ("calibrated", "added"))
    assert 0 < calibrated["unrelated_prompts"] < added["unrelated_prompts"]
    for one in calibrated["concepts"]:
        assert one["disturbance"] == one["predictors"]["rms"]
        assert len(one["groups"]) == 12
    mean = sum(ways["calibrated"].values()) / 2
    assert f"verdict: merge them calibrated, as by default: {mean:.2f} in the mean" in err
    (row,) = [line.split() for line in err.splitlines() if line.startswith("fox ")][1:]
    assert row[1:3] == [f"{ways[way]['fox']:.2f}" for way in ("calibrated", "added")]
    assert row[-2] == "owl"


def test_the_order_of_the_concepts_does_not_change_the_prediction(predict, files):
    first, *_ = predict(f"{files['ray']}:0.5", files["fox"])
    second, *_ = predict(files["fox"], f"{files['ray']}:0.5")
    assert first == second


def test_shared_indices_and_a_weight_of_zero_are_predicted_too(predict, files):
    ways, *_ = predict(files["fox"], f"{files['elk']}:0", "--allow-overlap")
    assert ways["added"]["elk"] is None and ways["calibrated"]["fox"] > 0
    assert ways["added"]["fox"] == pytest.approx(0, abs=1e-6)


def test_a_set_that_cannot_be_merged_is_not_run(sbora, files):
    status, out, _ = sbora("check", files["owl"], files["elk"], *QUICK)
    assert status == 2 and "crosstalk was left out" in out and "verdict" not in out


def test_concepts_that_do_not_fit_end_with_2_and_a_line_for_each_problem(sbora, files):
    status, out, err = sbora("check", files["fox"], files["owl"], files["elk"], "--no-crosstalk")
    assert (status, err) == (2, "")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert "fox and elk share 576 columns in 72 layers" in problems[0]
    assert "owl and elk have one token, <owl>" in problems[1]
    assert "a way out: --rename 'elk=<owl-2>', or --apply" in out
    assert "not mergeable: 2 problems" in out
    assert sbora("check", files["fox"], files["elk"], "--no-crosstalk", "--allow-overlap")[0] == 0


@pytest.mark.parametrize("how", [("--apply",), ("--rename", "elk=<moose>")])
def test_a_rename_writes_a_copy_that_no_longer_clashes(sbora, files, how, tmp_path):
    original = files["elk"].read_bytes()
    arguments = ("check", files["owl"], files["elk"], "--no-crosstalk", *how, "-o", "new", "--json")
    status, out, _ = sbora(*arguments)
    found = json.loads(out)
    assert (status, found["mergeable"], found["findings"]) == (0, True, [])
    (copy,) = found["renamed"]
    token = "<owl-2>" if how == ("--apply",) else "<moose>"
    assert copy["tokens"] == {"<owl>": token}
    assert [entry.token for entry in read_concept(copy["file"]).meta.tokens] == [token]
    assert files["elk"].read_bytes() == original
    assert refused(sbora(*arguments), "exists already")
    merge = ("check", files["owl"], copy["file"], "--no-crosstalk")
    assert sbora(*merge)[0] == 0


def test_without_a_base_the_rest_is_checked_and_crosstalk_is_said_to_be_left_out(
    sbora, files, monkeypatch
):
    def missing(*_):
        raise ResourceError("base 'x/y' cannot be fetched", "check the connection")

    monkeypatch.setattr(bases, "load_base", missing)
    status, out, err = sbora("check", files["fox"], files["owl"], "--base", "x/y")
    assert status == 0 and "mergeable" in out
    assert "crosstalk was left out" in out and "cannot be fetched" in err


def test_on_another_base_nothing_is_run(sbora, files, tmp_path):
    concept = read_concept(files["fox"])
    digests = {**concept.meta.fingerprint, min(concept.layers): "0" * 48}
    meta = concept.meta.model_copy(update={"fingerprint": digests})
    write_concept("foreign.safetensors", type(concept)(meta, concept.layers, concept.embeddings))
    status, out, _ = sbora("check", "foreign.safetensors", files["owl"], *QUICK)
    assert status == 2 and "problem: fox: this is not the base" in out
    assert "crosstalk was left out" in out


def test_wrong_options_are_refused_before_any_work(sbora, files, tmp_path):
    fox = files["fox"]
    assert refused(sbora("check"), "FILE")
    assert refused(sbora("check", "nobody"), "nobody")
    assert refused(sbora("check", fox, "--plot", "x.jpg"), ".png")
    assert refused(sbora("check", fox, "--plot", "x.png", "--no-crosstalk"), "--plot")
    assert refused(sbora("check", fox, "-s", "stepz=1"), "did you mean 'steps'")
    assert refused(sbora("check", fox, "--rename", "fox"), "NAME=<token>")
    shutil.copy(fox, "fox.safetensors")
    with open("fox.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert refused(sbora("check", "fox.safetensors"), "digest")


def test_one_concept_alone_is_mergeable(sbora, files):
    status, out, _ = sbora("check", files["fox"], *QUICK)
    assert status == 0 and "crosstalk" not in out
    assert "takes two concepts" in sbora("check", files["fox"], "--plot", "x.png")[1]


def test_a_set_is_inspected_and_registered_as_the_concepts_in_it(sbora, files, tmp_path):
    pair = [(read_concept(files["fox"]), 1.0), (read_concept(files["owl"]), 0.5)]
    digest = write_concept_set("pair.safetensors", pair)
    status, out, _ = sbora("inspect", "pair.safetensors")
    assert status == 0 and "a set of 2 concepts" in out and "0.5" in out
    found = json.loads(sbora("inspect", "pair.safetensors", "--json")[1])
    assert (found["digest"], found["allow_overlap"]) == (digest, False)
    assert {one["name"]: one["weight"] for one in found["concepts"]} == {"fox": 1.0, "owl": 0.5}
    added = json.loads(sbora("library", "add", "pair.safetensors", "--json")[1])["concepts"]
    assert sorted(entry["name"] for entry in added) == ["fox", "owl"]
    status, out, err = sbora("library", "show", "owl", "--plot", "owl.png")
    assert status == 0 and err == "" and "8 columns" in out
    assert sbora("check", "pair.safetensors", "--no-crosstalk")[0] == 0


def test_a_set_is_registered_as_a_whole_or_not_at_all(sbora, files, pocket):
    write_concept_set("trio.safetensors", [(read_concept(files[n]), 1.0) for n in NAMES])
    last = read_concept_set("trio.safetensors").concepts[-1][0].meta
    library = Library()
    library.reserve(pocket.key, last.variant, last.name, 8, last.widths, slot=5)
    before = library.concepts()
    assert refused(sbora("library", "add", "trio.safetensors"), f"has another '{last.name}'")
    assert library.concepts() == before != []
    library.remove(last.name)
    assert sbora("library", "add", "trio.safetensors")[0] == 0
    assert {entry.name for entry in library.concepts()} == set(NAMES)


def test_the_library_says_its_price_and_draws_itself(sbora, files):
    assert sbora("library", "list")[1].startswith("no concepts")
    assert refused(sbora("library", "list", "--plot", "own.png"), "empty")
    for name in ("fox", "owl", "ray"):
        assert sbora("library", "add", files[name])[0] == 0
    status, out, _ = sbora("library", "list", "--plot", "own.png")
    assert status == 0
    assert "2 concepts at rank 8 own 16 of 160 columns (10 %) of the narrowest layers" in out
    assert "1 concept at rank 8 owns 8 of 160 rows (5 %)" in out
    assert Image.open("own.png").height > 400
    listed = json.loads(sbora("library", "list", "--json")[1])
    assert [(c["variant"], c["groups"][0]["owned"]) for c in listed["capacity"]] == [
        ("fa", 16),
        ("fb", 8),
    ]
    status, out, _ = sbora("library", "show", "fox", "--plot", "fox.png")
    assert status == 0 and "8 columns" in out and "with its neighbours: 2 concepts" in out
    assert refused(sbora("library", "list", "--plot", "own.gif"), ".png")


def test_a_concept_may_share_a_slot_if_that_is_asked_for(sbora, files):
    assert sbora("library", "add", files["fox"])[0] == 0
    assert refused(sbora("library", "add", files["elk"]), "another concept", "--allow-overlap")
    assert sbora("library", "add", files["elk"], "--allow-overlap")[0] == 0
    out = sbora("library", "list")[1]
    assert "2 concepts at rank 8 own 8 of 160 columns" in out
