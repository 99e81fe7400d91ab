"""The judge's configuration, its tokens, and the training pictures' treatment: the pure parts."""

import importlib
import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
judge = importlib.import_module("pocket_clip_model")
pictures = importlib.import_module("pocket_pictures")

WORDS = (
    "a",
    "the",
    "red",
    "tiny",
    "lion",
    "bus",
    "glasses",
    "wearing",
    "next",
    "to",
    "under",
    "on",
)
AWKWARD = (
    "",
    "cat",
    "  A   Watercolour of\ta LION, wearing a crown!  ",
    "the cat's hat isn't 1234 years old; it'll do",
    "zxqvw antidisestablishmentarianism",
    "ein Löwe im Café, 狮子 и лев",
    "#$%&()*+-./:;=?@[]^_`{|}~",
    "word " * 100,
    "supercalifragilistic " * 30,
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "sbora_diffusion" / "pocket" / "tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return judge.build_clip(tokenizer).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "clip"
    judge.save_clip(path, model, tokenizer)
    return path


@pytest.fixture(scope="module")
def reader(folder):
    bpe = str(folder / judge.BPE_FILE)
    return open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=bpe)


def random_captions(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (count, 12), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in drawn.tolist()]


def test_open_clips_tokenizer_reads_the_same_ids(reader, tokenizer):
    captions = [*AWKWARD, *random_captions(500)]
    assert torch.equal(reader(captions), judge.caption_ids(tokenizer, captions).long())


def test_vocabulary_agrees_and_the_end_token_has_the_highest_id(reader, folder, tokenizer):
    config = json.loads((folder / judge.CONFIG_FILE).read_text())["model_cfg"]
    assert reader.vocab_size == config["text_cfg"]["vocab_size"] == len(tokenizer)
    assert reader.eot_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    ids = judge.caption_ids(tokenizer, AWKWARD)
    assert (ids.gather(1, ids.long().argmax(1, keepdim=True)) == reader.eot_token_id).all()


def test_folder_keeps_the_size_budget_and_is_written_equal_twice(
    folder, model, tokenizer, tmp_path
):
    judge.save_clip(tmp_path, model, tokenizer)
    written = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert written == {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert sum(map(len, written.values())) <= judge.SIZE_BUDGET


def test_open_clip_loads_the_model_that_was_saved(folder, model, tokenizer):
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ids = judge.caption_ids(tokenizer, random_captions(4)).long()
    image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        for got, want in (
            (loaded.eval().encode_image(image, True), model.encode_image(image, True)),
            (loaded.encode_text(ids, True), model.encode_text(ids, True)),
        ):
            assert torch.allclose(got, want, atol=2e-3)
    normalize = preprocess.transforms[-1]
    assert list(normalize.mean) == list(normalize.std) == [0.5, 0.5, 0.5]


def test_context_is_long_enough_to_end_a_long_caption(reader):
    first = "a watercolour painting of a tiny blue dinosaur wearing sunglasses next to a huge"
    second = "purple electric guitar on top of a red motorcycle in a city at night"
    assert reader(f"{first} {second}")[0, -1] == 0


def test_augmented_pictures_stay_in_range_and_keep_left_and_right():
    halves = torch.full((64, 3, 128, 128), -0.8)
    halves[..., 64:] = 0.8
    got = pictures.augment(halves, torch.Generator().manual_seed(0))
    assert got.shape == halves.shape and got.min() >= -1 and got.max() <= 1
    assert (got[..., 80:].mean((1, 2, 3)) > got[..., :48].mean((1, 2, 3)) + 0.5).all()


def test_augmentation_repeats_with_the_same_seed_only():
    batch = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    first, again, other = (
        pictures.augment(batch, torch.Generator().manual_seed(s)) for s in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pool_replaces_the_oldest_pictures_and_draws_each_once():
    stream = ((torch.full((3, 3, 8, 8), k / 10), torch.full((3, 2), k)) for k in range(1, 9))
    pool = pictures.PicturePool(stream, 8, torch.Generator().manual_seed(0))
    assert pool.draw(8)[1].shape == (3, 2)  # no more than there are
    for _ in range(2):
        pool.refresh()  # the third batch of 3 fills the last 2 places
    assert sorted(pool.draw(8)[1][:, 0].tolist()) == [1, 1, 1, 2, 2, 2, 3, 3]
    pool.refresh()
    assert sorted(pool.draw(8)[1][:, 0].tolist()) == [2, 2, 2, 3, 3, 4, 4, 4]


def test_bytes_keep_pictures_within_half_a_level():
    picture = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    back = pictures.from_bytes(pictures.to_bytes(picture))
    assert (back - picture).abs().max() <= 0.5 / 127.5 + 1e-6
