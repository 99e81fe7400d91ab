import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from sbora_diffusion import cli, demo, evaluate
from sbora_diffusion.alignment import Judges, load_judges, score
from sbora_diffusion.console import Console
from sbora_diffusion.contact_sheet import TILE
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.demo import ALONE, BASE, MERGED, Demo
from sbora_diffusion.diffusion import bases
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import draw
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluate import PROMPTS, EvaluateConfig, evaluate_concept
from sbora_diffusion.evaluation.features import EfficientNetFeatures
from sbora_diffusion.pictures import read_prompt, save_png
from tests.conftest import CONCEPTS, TINY
from tests.diffusion.helpers import snapshot
from tests.evaluation.tiny_clip import write_tiny_clip
from tests.test_cli import refused

QUICK = ("--steps", 1, "--num", 1)
BEAR = CONCEPTS / "plushbear"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return write_tiny_clip(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judges(clip) -> Judges:
    return Judges(load_judges(clip).clip)


@pytest.fixture
def sbora(pocket, clip, monkeypatch, capsys, tmp_path):
    """Run `sbora evaluate` with the tiny judge, two prompts and pictures of one colour each.

    Gives (exit status, stdout, stderr).
    """
    monkeypatch.setattr(bases, "load_base", lambda *_: pocket)
    monkeypatch.setattr(evaluate, "draw", draw_quickly)
    monkeypatch.setattr(EfficientNetFeatures, "installed", lambda: False)
    monkeypatch.setitem(evaluate_concept.__kwdefaults__, "prompts", PROMPTS[:2])
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, judge=clip):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in ("evaluate", *arguments, "--clip", judge)])
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    """Two pictures that hold their prompts, and one that does not."""
    place = tmp_path / "drawn"
    for name, colour in (("a", "red"), ("b", "blue")):
        parameters = {"prompt": f"a photo of <bear> on a {colour} background", "seed": 1}
        save_png(Image.new("RGB", (64, 48), colour), place / f"{name}.png", parameters)
    Image.new("RGB", (64, 64), "lime").save(place / "c.bmp")
    return place


def draw_quickly(_base, texts, seeds, steps, guidance, negative_prompt, on_step):
    """A colour that depends on everything that decides a picture."""
    colours = [
        hashlib.sha256(f"{text} {seed} {steps} {guidance} {negative_prompt}".encode()).digest()[:3]
        for text, seed in zip(texts, seeds, strict=True)
    ]
    on_step(steps, steps)
    return [Image.new("RGB", (32, 32), tuple(colour)) for colour in colours]


def cosine(a, b):
    return torch.dot(a, b).item() / math.sqrt(torch.dot(a, a) * torch.dot(b, b))


def test_a_concept_is_held_against_its_class_word_from_the_same_seeds(
    pocket, tiny_concepts, judges
):
    concept = read_concept(tiny_concepts["plushbear"])
    config, before, calls = EvaluateConfig(num=2, steps=1, seed=5), snapshot(pocket), []
    found = evaluate_concept(
        pocket, concept, [Image.new("RGB", (64, 64))], judges, config, prompts=PROMPTS[1:2],
        on_step=lambda *call: calls.append(call),
    )  # fmt: skip
    after = snapshot(pocket)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert calls == [(1, 2), (2, 2)]

    texts = ["a photo of a teddy bear in the snow"] * 2
    bare, ours = found.groups["class_word"], found.groups["concept"]
    assert list(bare.texts) == list(ours.texts) == texts
    drawn = draw(pocket, texts, [5, 6], 1)
    assert [p.tobytes() for p in bare.pictures] == [p.tobytes() for p in drawn]
    pairs = zip(ours.pictures, drawn, strict=True)
    assert all(a.tobytes() != b.tobytes() for a, b in pairs)


def test_figures_are_means_of_cosines_over_all_pictures(pocket, tiny_concepts, judges, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", draw_quickly)
    concept = read_concept(tiny_concepts["plushbear"])
    references = [open_image(path) for path in sorted(BEAR.glob("*.jpg"))[:2]]
    config = EvaluateConfig(num=2)
    found = evaluate_concept(pocket, concept, references, judges, config, prompts=PROMPTS[:3])
    ours, record = found.groups["concept"], found.record["concept"]
    assert len(ours.pictures) == len(ours.texts) == 6

    images, words = judges.clip.images(ours.pictures), judges.clip.texts(ours.texts)
    seen = judges.clip.images(references)
    text = sum(cosine(a, b) for a, b in zip(images, words, strict=True)) / 6
    image = sum(cosine(a, b) for a in images for b in seen) / 12
    assert record["text_alignment"] == pytest.approx(text, abs=1e-4)
    assert record["image_alignment"] == {judges.clip.name: pytest.approx(image, abs=1e-4)}
    change, bare = found.record["difference"], found.record["class_word"]
    assert change["text_alignment"] == pytest.approx(text - bare["text_alignment"], abs=2e-4)
    parts = found.record["prompts"]
    assert [part["prompt"] for part in parts] == [p.format("<plushbear>") for p in PROMPTS[:3]]
    third = sum(cosine(a, b) for a, b in zip(images[4:], words[4:], strict=True)) / 2
    assert parts[2]["concept"]["text_alignment"] == pytest.approx(third, abs=1e-4)


def test_a_concept_file_gives_a_table_a_sheet_and_the_same_figures_again(sbora, tiny_concepts):
    bear = tiny_concepts["plushbear"]
    command = (f"{bear}:0.5", "--references", BEAR, *QUICK, "-s", "guidance=2")
    status, out, err = sbora(*command, "-o", "deep/sheet.png")
    assert (status, err) == (0, "")
    assert "<plushbear> counts as 'a teddy bear'" in out and "[lite2]" in out
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert any(row == "text alignment" for row in rows)
    assert any(row.startswith("image alignment, ") for row in rows)
    assert read_prompt(Path("deep/sheet.png")) is None  # else a sheet could be judged as a picture
    with Image.open("deep/sheet.png") as sheet:
        assert sheet.width > 5 * TILE and sheet.height > 3 * TILE

    records = [json.loads(sbora(*command, "--json")[1]) for _ in range(2)]
    for record in records:
        assert record.pop("seconds") > 0
    assert records[0] == records[1]
    other = json.loads(sbora(*command, "--seed", 1, "--json")[1])
    assert other["concept"] != records[0]["concept"]
    assert records[0]["weight"] == 0.5 and records[0]["settings"]["guidance"] == 2
    assert records[0]["concept"]["pictures"] == records[0]["class_word"]["pictures"] == 2


def test_references_are_looked_for_beside_the_user(sbora, tiny_concepts, tmp_path):
    bear = tiny_concepts["plushbear"]
    assert refused(sbora(bear), "concepts/plushbear does not exist", "--references")
    shutil.copytree(BEAR, tmp_path / "concepts" / "plushbear")
    status, out, _ = sbora(bear, *QUICK, "--json")
    assert status == 0 and json.loads(out)["references"] == 5


def test_a_folder_is_judged_by_the_prompts_in_its_pictures(sbora, folder, judges):
    status, out, err = sbora(folder, "--json")
    record = json.loads(out)
    assert status == 0
    assert "does not know <bear>" in err and "1 pictures hold no prompt" in err
    assert record["pictures"] == 3 and record["image_alignment"] == {}
    assert record["files"][2]["text"] is None and record["files"][2]["text_alignment"] is None

    said = ("--token", "<bear>=teddy bear", "--prompt", "a lime", "--references", BEAR)
    status, out, err = sbora(folder, *said, "--json", "-o", "sheet.png")
    record = json.loads(out)
    assert status == 0 and "warning" not in err
    texts = [f"a photo of teddy bear on a {c} background" for c in ("red", "blue")] + ["a lime"]
    assert [file["text"] for file in record["files"]] == texts
    pictures = [open_image(path) for path in sorted(folder.iterdir())]
    pairs = zip(judges.clip.images(pictures), judges.clip.texts(texts), strict=True)
    expected = [cosine(image, text) for image, text in pairs]
    assert [f["text_alignment"] for f in record["files"]] == pytest.approx(expected, abs=1e-4)
    assert record["text_alignment"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert list(record["image_alignment"]) == [judges.clip.name]
    with Image.open("sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 0, 255), (0, 255, 0)} <= colours
    assert "text alignment" in sbora(folder, *said)[1]


def test_many_pictures_are_judged_a_few_at_a_time_with_the_same_figures(
    folder, judges, monkeypatch
):
    calls = []
    whole = evaluate.evaluate_folder(folder, judges, prompt="a bear")
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    parts = evaluate.evaluate_folder(
        folder, judges, prompt="a bear", on_step=lambda *call: calls.append(call)
    )
    assert parts.record == whole.record
    assert calls == [(2, 3), (3, 3)]


def test_wrong_targets_are_refused_in_one_line(sbora, folder, tiny_concepts, tmp_path):
    bear, nowhere = tiny_concepts["plushbear"], tmp_path / "nowhere"
    assert refused(sbora(nowhere), "nowhere does not exist")
    assert refused(sbora("plushbaer"), "neither a concept file")
    assert refused(sbora(f"{nowhere}/x.safetensors:0.5"), "does not exist")
    assert refused(sbora(bear, "--references", nowhere), "nowhere is not a folder")
    nowhere.mkdir()
    assert refused(sbora(nowhere), "has no pictures")
    assert refused(sbora(folder, "--references", nowhere), "has no pictures")
    (folder / "a.png").unlink()
    (folder / "b.png").unlink()
    assert refused(sbora(folder), "hold no prompts", "--prompt", "--references")
    (folder / "d.png").write_text("not a picture")
    assert refused(sbora(folder, "--prompt", "x"), "d.png", "not a picture")
    assert not (tmp_path / "picture.png").exists()


def test_wrong_options_are_refused_in_one_line(sbora, folder, tiny_concepts):
    bear = tiny_concepts["plushbear"]
    assert refused(sbora(folder, judge="ViT-B-33"), "'ViT-B-33'", "did you mean")
    assert refused(sbora(folder, judge="ViT-B-32"), "needs weights")
    assert refused(sbora(folder, "--token", "bear"), "--token 'bear' must be <TOKEN>=NOUN")
    assert refused(sbora(folder, "--num", 3), "--num is for a concept file")
    assert refused(sbora(folder, "-s", "steps=3"), "--set is for a concept file")
    assert refused(sbora(bear, "--prompt", "a bear"), "--prompt is for a folder")
    assert refused(sbora(bear, "--num", 0), "num")
    assert refused(sbora(bear, "-s", "numm=2"), "did you mean 'num'")
    assert refused(sbora(folder, "-o", "sheet.jpg"), ".png")
    assert refused(sbora(folder, "--device", "warp9"), "device 'warp9'")


def test_the_prompt_is_read_back_and_nothing_else_is_taken_for_one(folder):
    assert read_prompt(folder / "a.png") == "a photo of <bear> on a red background"
    assert read_prompt(folder / "c.bmp") is None
    odd = folder / "odd.png"
    for content in ("{", "[]", '"x"', "{}", '{"prompt": 3}'):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("sbora", content)
        Image.new("RGB", (4, 4)).save(odd, pnginfo=chunks)
        assert read_prompt(odd) is None
    odd.write_text("not a picture")
    assert read_prompt(odd) is None


def test_ready_made_pictures_can_be_scored_with_and_without_texts(judges):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    scores = score(judges, pictures, [None, "a red bear"], judges.features(pictures[:1]))
    assert scores.text.isnan().tolist() == [True, False]
    assert scores.image[judges.clip.name][0].item() == pytest.approx(1)
    assert scores.means()["text_alignment"] == round(scores.text[1].item(), 4)
    assert score(judges, pictures, [None, None]).means()["text_alignment"] is None


def test_nouns_get_their_article():
    assert [with_article(noun) for noun in ("apple", "Ox", "cat")] == ["an apple", "an Ox", "a cat"]


@pytest.fixture
def finished(pocket, tmp_path):
    """A demo that has drawn everything, without having done so."""
    subject = read_subject(BEAR)
    colours = {BASE: "red", ALONE: "lime", MERGED: "blue"}
    return Demo(
        pocket, tmp_path, Console(), TINY, CalibrateConfig(), 1, [subject],
        references={"plushbear": [Image.new("RGB", (64, 64), "lime")]},
        pictures={
            ("plushbear", model): [Image.new("RGB", (64, 64), colour)] * 2
            for model, colour in colours.items()
        },
    )  # fmt: skip


def test_the_demo_compares_base_learned_and_merged(finished, judges, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_judges", lambda: judges)
    demo._align(finished)
    figures = finished.alignment["plushbear"]
    likeness = {model: part["image_alignment"][judges.clip.name] for model, part in figures.items()}
    assert likeness[ALONE] == pytest.approx(1)
    assert likeness[ALONE] > max(likeness[BASE], likeness[MERGED])
    assert demo._record(finished)["alignment"] == finished.alignment
    out = capsys.readouterr().out
    assert "image alignment" in out and "text alignment" in out and "1.000" in out


def test_the_demo_goes_on_without_a_judge(finished, monkeypatch, capsys):
    def missing():
        raise ConfigError("evaluation needs open_clip", "pip install it")

    monkeypatch.setattr(demo, "load_judges", missing)
    demo._align(finished)
    assert finished.alignment == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out" in line and "pip install it" in line
