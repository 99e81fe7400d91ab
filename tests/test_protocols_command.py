"""`sbora evaluate` by published protocols, with further judges, and on wrong input."""

import json
import shutil

import pytest
from PIL import Image

from sbora_diffusion.alignment import score
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.evaluation.dino import DinoFeatures
from sbora_diffusion.evaluation.protocols import CUSTOM_DIFFUSION, MIX_OF_SHOW
from sbora_diffusion.pictures import save_png
from tests.evaluation.test_dino import folder as dino_weights
from tests.evaluation.test_dino import network
from tests.test_cli import refused
from tests.test_evaluate_command import BEAR, QUICK, clip, cosine, judges, sbora

__all__ = ["clip", "dino_weights", "judges", "network", "sbora"]


@pytest.fixture
def drawn(tmp_path):
    """Three pictures of a bear, as Custom Diffusion writes prompts."""
    place = tmp_path / "drawn"
    for k, colour in enumerate(("red", "blue", "lime")):
        prompt = f"a <bear> teddy bear on a {colour} background"
        save_png(Image.new("RGB", (64, 48), colour), place / f"{k}.png", {"prompt": prompt})
    return place


SAID = ("--token", "<bear>=teddy bear")
WRITTEN = [f"a teddy bear on a {colour} background" for colour in ("red", "blue", "lime")]


def naive_figures(judges, folder, prefix):
    """Text cosines with a prefix, and image cosines with each reference: [picture][reference]."""
    images = judges.clip.images([open_image(file) for file in sorted(folder.iterdir())])
    words = judges.clip.texts([prefix + text for text in WRITTEN])
    seen = judges.clip.images([open_image(file) for file in sorted(BEAR.glob("*.jpg"))])
    text = [cosine(a, b) for a, b in zip(images, words, strict=True)]
    return text, [[cosine(a, b) for b in seen] for a in images]


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values), abs=1e-4)


def test_mix_of_shows_protocol_gives_its_figures_and_says_so(sbora, drawn, judges):
    command = (drawn, *SAID, "--references", BEAR, "--protocol", "mix-of-show")
    record = json.loads(sbora(*command, "--json")[1])
    text, pairs = naive_figures(judges, drawn, "A photo depicts ")
    assert record["text_alignment"] == mean(2.5 * max(value, 0) for value in text)
    name = judges.clip.name
    assert record["image_alignment"] == {
        name: mean(value for row in pairs for value in row),
        f"{name}, first-reference": mean(max(row[0], 0) for row in pairs),
    }
    assert [file["text"] for file in record["files"]] == WRITTEN
    assert record["clip"] == name
    said = record["protocol"]
    assert (said["name"], said["prefix"]) == ("mix-of-show", "A photo depicts ")
    assert (said["text_scale"], said["clip_as_published"]) == (2.5, False)

    out = sbora(*command)[1]
    assert "protocol mix-of-show: text 2.5 × max(cosine, 0) behind 'A photo depicts '" in out
    assert f"published with ViT-B-32:openai: figures of {name} compare with those only if" in out
    assert f"image alignment, {name}, first-reference" in out and "DINO" not in out


def test_custom_diffusions_protocol_removes_tokens_and_misses_dino(sbora, drawn, judges):
    command = (drawn, "--references", BEAR, "--protocol", "custom-diffusion")
    status, out, err = sbora(*command, "--json")
    record = json.loads(out)
    text, pairs = naive_figures(judges, drawn, "")
    assert status == 0 and "<bear> removed" in err
    assert [file["text"] for file in record["files"]] == WRITTEN
    assert record["removed_tokens"] == ["<bear>"] and record["unknown_tokens"] == []
    assert record["text_alignment"] == mean(2.5 * max(value, 0) for value in text)
    assert record["image_alignment"] == {
        judges.clip.name: mean(value for row in pairs for value in row)
    }
    _, out, err = sbora(*command, *SAID)
    assert "--dino gives its weights" in out and "removed" not in err


def test_raw_cosines_are_the_default_and_stated(sbora, drawn, judges):
    plain, named = (
        json.loads(sbora(drawn, *SAID, "--references", BEAR, *more, "--json")[1])
        for more in ((), ("--protocol", "raw-cosine"))
    )
    text, _ = naive_figures(judges, drawn, "")
    assert plain == named and plain["text_alignment"] == mean(text)
    assert plain["protocol"]["name"] == "raw-cosine" and plain["removed_tokens"] == []
    out = sbora(drawn, *SAID)[1]
    assert "protocol raw-cosine: text cosine" in out and "published with" not in out


def test_a_concept_is_judged_by_a_protocol_too(sbora, tiny_concepts, judges):
    command = (tiny_concepts["plushbear"], "--references", BEAR, *QUICK, "--json")
    raw = json.loads(sbora(*command)[1])
    found = json.loads(sbora(*command, "--protocol", "mix-of-show")[1])
    assert found["protocol"]["name"] == "mix-of-show"
    first = f"{judges.clip.name}, first-reference"
    assert first in found["difference"]["image_alignment"]
    assert first not in raw["difference"]["image_alignment"]
    for group in ("concept", "class_word"):
        name = judges.clip.name
        assert found[group]["image_alignment"][name] == raw[group]["image_alignment"][name]
        assert found[group]["text_alignment"] != raw[group]["text_alignment"]


def test_the_prefix_is_read_by_the_judge_and_a_missing_text_stays_missing(judges):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    found = score(judges, pictures, [None, "a red bear"], protocol=MIX_OF_SHOW)
    with_prefix = score(judges, pictures, [None, "A photo depicts a red bear"])
    assert found.text.isnan().tolist() == [True, False]
    assert found.text[1] == pytest.approx(2.5 * max(with_prefix.text[1].item(), 0))
    without = score(judges, pictures, [None, "a red bear"], protocol=CUSTOM_DIFFUSION)
    assert without.text[1] != found.text[1]


def test_dino_judges_beside_clip(sbora, drawn, dino_weights, tmp_path):
    shutil.copytree(BEAR, tmp_path / "one", ignore=shutil.ignore_patterns("0[2-9].jpg"))
    command = (drawn, *SAID, "--references", tmp_path / "one", "--dino", dino_weights, "--json")
    record = json.loads(sbora(*command, "--protocol", "custom-diffusion")[1])
    judge = DinoFeatures.load(str(dino_weights))
    images = judge.images([open_image(file) for file in sorted(drawn.iterdir())])
    (seen,) = judge.images([open_image(BEAR / "01.jpg")])
    assert record["image_alignment"]["dino-vits16"] == mean(cosine(image, seen) for image in images)


def test_the_kernel_distance_to_real_pictures_is_printed_and_recorded(sbora, drawn):
    pytest.importorskip("torchmetrics")
    status, out, _ = sbora(drawn, *SAID, "--kid", BEAR, "--json")
    (found,) = json.loads(out)["kid"].values()
    assert status == 0 and found["subset_size"] == 3 and found["subsets"] == 100
    assert found["mean"] > 0.1
    assert "kernel distance (KID)" in sbora(drawn, *SAID, "--kid", BEAR)[1]


def test_wrong_input_is_refused_in_one_line(sbora, drawn, tiny_concepts, tmp_path):
    bear, spoilt, nowhere = tiny_concepts["plushbear"], tmp_path / "spoilt", tmp_path / "nowhere"
    spoilt.mkdir()
    (spoilt / "notes.txt").write_text("no picture")
    for target in (bear, drawn):
        assert refused(sbora(target, "--references", spoilt), "spoilt has no pictures")
        assert refused(sbora(target, "--references", nowhere), "nowhere is not a folder")
    (spoilt / "a.png").write_text("not a picture")
    (spoilt / "b.jpg").write_bytes(b"")
    assert refused(sbora(spoilt, "--prompt", "a bear"), "a.png is not a picture that can be read")
    for target in (bear, drawn):
        found = sbora(target, "--references", spoilt)
        assert refused(found, "a.png is not a picture that can be read")
    assert refused(sbora(drawn, "--references", BEAR / "01.jpg"), "is not a folder")


def test_wrong_options_are_refused_in_one_line(sbora, drawn, tiny_concepts, tmp_path):
    assert refused(sbora(drawn, "--protocol", "mixofshow"), "did you mean 'mix-of-show'")
    assert refused(sbora(drawn, "--dino", tmp_path), "holds no weights of DINO")
    assert refused(sbora(drawn, "--kid", tmp_path / "nowhere"), "nowhere is not a folder")
    assert refused(sbora(tiny_concepts["plushbear"], "--kid", BEAR), "--kid is for a folder")
    alone = tmp_path / "alone"
    save_png(Image.new("RGB", (8, 8)), alone / "a.png", {"prompt": "a bear"})
    assert refused(sbora(alone, "--kid", BEAR), "two pictures or more", "found 1 and 5")
