"""The embedded judge: a folder that stock open_clip loads, and that knows the world's words."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.evaluation.features import POCKET_CLIP, ClipFeatures
from sbora_diffusion.evaluation.metrics import classify
from tests.conftest import CONCEPTS

COLOURS = {"red": "#d02020", "green": "#20a030", "blue": "#2050d0", "yellow": "#f0d020"}


@pytest.fixture(scope="module")
def judge() -> ClipFeatures:
    return ClipFeatures.load()


def test_the_folder_is_small_and_holds_nothing_else():
    files = {file.name: file.stat().st_size for file in POCKET_CLIP.iterdir()}
    needed = {"open_clip_config.json", "open_clip_model.safetensors", "bpe.txt.gz"}
    assert needed <= files.keys() <= needed | {"README.md"}
    assert sum(files.values()) <= 8 * 2**20


def test_weights_are_half_precision():
    with safe_open(POCKET_CLIP / "open_clip_model.safetensors", "pt") as weights:
        types = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert types <= {"F16", "I64"} and "F16" in types


def test_stock_open_clip_loads_it_in_full_precision(monkeypatch, tmp_path, judge):
    monkeypatch.chdir(tmp_path)
    name = f"local-dir:{POCKET_CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(POCKET_CLIP / "bpe.txt.gz"))
    text = json.loads((POCKET_CLIP / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert tokenizer.vocab_size == text["vocab_size"]

    picture = Image.open(CONCEPTS / "siamese" / "01.jpg").convert("RGB")
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
        words = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
    torch.testing.assert_close(image, judge.images([picture]))
    torch.testing.assert_close(words, judge.texts(["a photo of a cat"]))


def test_plain_squares_are_nearest_to_their_own_colour(judge):
    squares = [Image.new("RGB", (128, 128), colour) for colour in COLOURS.values()]
    texts = judge.texts([f"a {colour} background" for colour in COLOURS])
    assert classify(judge.images(squares), texts).tolist() == list(range(len(COLOURS)))


def test_most_subjects_it_was_never_shown_are_nearest_to_their_own_noun(judge):
    subjects = [
        read_subject(CONCEPTS / name)
        for name in sorted(p.name for p in CONCEPTS.iterdir() if p.is_dir())
    ]
    texts = judge.texts([f"a photo of {s.settings.class_noun}" for s in subjects])
    hits = [
        int(found) == k
        for k, subject in enumerate(subjects)
        for found in classify(judge.images([Image.open(p) for p in subject.images]), texts)
    ]
    assert sum(hits) / len(hits) > 0.5  # chance is 1 / 14


def test_words_it_has_never_seen_are_read_too(judge):
    known, unknown = judge.texts(["a photo of a cat", "a photo of a zxqv 中 🐻"])
    assert unknown.isfinite().all() and (known - unknown).abs().max() > 1e-3
