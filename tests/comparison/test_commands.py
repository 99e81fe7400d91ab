"""`sbora bench tune`, `single`, `merge` and `figure`: from nothing to tables, and wrong input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from sbora_diffusion.comparison.preset import load_preset
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.evaluation.prompt_sets import load_prompts
from tests.comparison.conftest import NAMES
from tests.conftest import CONCEPTS
from tests.test_cli import refused


@pytest.fixture
def bench(sbora, preset_file, small_base):
    def run(command, *arguments):
        commit = () if command == "figure" or "--render" in arguments else ("--commit", "abc")
        own = ("--preset", preset_file, *commit, *arguments)
        return sbora("bench", command, *own, "--device", "cpu")

    return run


def test_the_commands_make_records_and_tables_from_nothing(quick, bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/sbora", "bench", "single", "--seeds", "0"])
    assert bench("tune", "--out", "trials")[0] == 0
    assert bench("tune", "--out", "trials", "--render")[0] == 0
    record = json.loads(Path("tuning.json").read_text())
    assert record["methods"].keys() == {"sbora-fa", "lora", "words"}
    status, out, _ = bench("single", "--seeds", "0", "--out", "single", "--json")
    assert status == 0 and json.loads(out)["left"] == 0
    lines = [json.loads(x) for x in Path("single/small.jsonl").read_text().splitlines()]
    settings = record["methods"]["lora"]["settings"]
    lora = next(x for x in lines if x["method"] == "lora")
    assert lora["tuned"] and lora["setting"]["config"].items() >= settings.items()
    assert lora["run"]["command"] == "sbora bench single --seeds 0"
    assert bench("merge", "--seeds", "0", "--out", "merge", "--methods", "lora,sbora-fa")[0] == 0
    for command in ("single", "merge"):
        assert bench(command, "--out", command, "--render")[0] == 0
        assert Path(f"page_{command}.png").exists()
    page = Path("page.md").read_text()
    assert "| SBoRA-FA |" in page and "3 concepts in one model" in page and "not tuned" not in page


def test_the_figure_has_references_left_and_a_column_for_each_method(quick, bench):
    arguments = ("--methods", "lora-half,class-word", "--concepts", NAMES[0], "--prompts", "0,7")
    assert bench("figure", *arguments, "-o", "alone.png")[0] == 0
    assert bench("figure", *arguments, "--merged", "-o", "merged.png")[0] == 0
    with Image.open("alone.png") as alone:
        assert alone.width == 2 * 24 + 3 * 204 - 12 and alone.height > 2 * 192


def test_work_that_is_left_is_named(quick, bench):
    status, out, _ = bench("single", "--methods", "class-word", "--limit", "0", "--out", "single")
    assert status == 0 and "3 left: run it again to go on" in out


def copied(names=NAMES):
    for name in names:
        shutil.copytree(CONCEPTS / name, Path("own") / name)
    return Path("own")


@pytest.mark.parametrize("command", ["single", "merge"])
def test_an_image_folder_without_a_readable_image_is_refused(bench, command):
    folder = copied()
    for image in (folder / "plushbear").glob("*.jpg"):
        image.write_bytes(b"no picture")
    own = ("-s", f"concepts_folder={folder}")
    assert refused(bench(command, *own), "own/plushbear/01.jpg", "not a picture")
    for image in (folder / "plushbear").glob("*.jpg"):
        image.unlink()
    assert refused(bench(command, *own), "own/plushbear has no reference images")


def test_a_missing_reference_folder_is_refused(bench):
    folder = copied(NAMES[:2])
    assert refused(bench("single", "-s", f"concepts_folder={folder}"), "own/toytrain", "not exist")
    assert refused(bench("single", "-s", "concepts_folder=nowhere"), "nowhere", "does not exist")


def test_a_model_that_does_not_fit_what_is_kept_is_refused(quick, bench):
    arguments = ("--methods", "lora", "--seeds", "0", "--concepts", ",".join(NAMES[:2]))
    assert bench("single", *arguments)[0] == 0
    note = Path(f"build/methods/small/lora-0/{NAMES[0]}.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "base": "sd1-0"}))
    assert refused(bench("merge", *arguments), "trained otherwise", "base was 'sd1-0'", "--files")
    other = ("-s", "guidance=2")
    assert refused(bench("single", *arguments, *other), "drawing.guidance was 1.0", "--out")


def test_wrong_names_and_values_are_refused_in_one_line(bench, sbora):
    assert refused(bench("single", "--methods", "lroa"), "unknown method 'lroa'", "'lora'")
    assert refused(bench("single", "--concepts", "cat"), "unknown concept 'cat'")
    assert refused(bench("single", "--seeds", "a"), "must be numbers")
    assert refused(bench("single", "--part", "3", "--parts", "2"), "--part must be 1 to 2")
    assert refused(bench("single", "-s", "nmu=3"), "unknown key 'nmu'", "'num'")
    assert refused(bench("single", "-s", "common={lr=3}"), "unknown key 'lr'")
    assert refused(bench("figure", "-o", "x.png", "--prompts", "20"), "no prompt 20")
    assert refused(bench("figure", "-o", "x.jpg"), "must end in .png")
    assert refused(bench("single", "--render"), "no line of preset small")
    assert refused(bench("tune", "--render"), "no trial of preset small")
    assert refused(bench("merge", "--methods", "class-word"), "nothing to merge: 0 methods")
    assert refused(bench("merge", "--concepts", NAMES[0]), "nothing to merge", "1 concepts")
    assert refused(sbora("bench", "single", "--preset", "none"), "no preset 'none'", "pocket")


def test_a_preset_whose_names_do_not_fit_together_is_refused(preset_file):
    for more, words in (
        ({"tables": {"equal-rank": ["lroa"]}}, "table: method 'lroa'"),
        ({"methods": {"lora": {"method": "lroa"}}}, "no method 'lroa'"),
        ({"methods": {"lora": {"grid": "none"}}}, "grid 'none'"),
        ({"protocols": ["mix-of-show"]}, "raw-cosine must be among"),
        ({"wording": "none"}, "wording 'none'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_preset(str(preset_file), overrides=more)


def test_the_shipped_presets_cover_the_tables():
    pocket, paper = load_preset("pocket"), load_preset("paper")
    assert set(pocket.concepts) == {file.parent.name for file in CONCEPTS.glob("*/concept.toml")}
    assert len(pocket.seeds) >= 3 and pocket.num >= 10 and len(pocket.tuning.subjects) == 6
    ranks = {n: pocket.config(n, 0).rank for n in pocket.tables["equal-rank"]}
    assert {ranks[n] for n in ("sbora-fa", "sbora-fb", "lora", "dora", "mix-of-show")} == {8}
    assert pocket.config("lora-half", 0).rank == 4
    assert paper.clip == "ViT-B-32:openai" and paper.wording == "benchmark"
    assert (paper.num, paper.steps, paper.guidance) == (50, 50, 7.5)
    assert paper.drawing(50)["picture_seed"] == 1 and load_prompts(paper.wording)
    for preset in (pocket, paper):
        for name in preset.methods:
            preset.config(name, 0)
