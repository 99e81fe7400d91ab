"""References of every kind become training pictures; what is no picture is named."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sbora_diffusion.core.errors import DataError
from sbora_diffusion.diffusion.concepts import ConceptSettings, Subject
from sbora_diffusion.diffusion.dataset import (
    MAX_PIXELS,
    TEMPLATES,
    crop,
    load_examples,
    open_image,
    to_tensor,
)

SETTINGS = ConceptSettings(name="toy", class_noun="toy", token="<toy>")
ORIENTATION = 0x0112


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth and different in its four corners, so that turns and mirrors can be told apart."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([across, down, np.full_like(across, 60)], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def write(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def examples_of(path: Path, size: int = 32, copies: int = 3, flip: bool = True, seed: int = 0):
    subject = Subject(settings=SETTINGS, images=(path,))
    return load_examples(subject, size, copies, flip, seed)


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize(
    "size", [(64, 64), (4000, 3000), (300, 90), (90, 300), (1, 1), (1, 2000), (2000, 1)]
)
def test_references_of_any_size_and_shape_become_squares_in_range(tmp_path, size):
    examples = examples_of(write(picture(*size), tmp_path / "a.png", compress_level=1))
    assert len(examples) == 3
    for example in examples:
        assert example.pixels.shape == (3, 32, 32) and example.pixels.dtype == torch.float32
        assert -1 <= example.pixels.min() <= example.pixels.max() <= 1


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("png", mode) for mode in ("RGBA", "LA", "L", "1", "P")),
        *(("tif", mode) for mode in ("RGBA", "LA", "L", "CMYK", "P")),
        *(("jpg", mode) for mode in ("L", "CMYK")),
        ("webp", "RGBA"),
    ],
)
def test_every_colour_mode_is_read_as_rgb(tmp_path, suffix, mode):
    image = picture(40, 30, mode)
    upright = open_image(write(image, tmp_path / f"a.{suffix}"))
    assert upright.mode == "RGB" and upright.size == (40, 30)
    assert distance(upright, image.convert("RGB")) < 6


def test_transparency_is_laid_over_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    assert open_image(write(clear, tmp_path / "a.png")).getpixel((3, 3)) == (255, 255, 255)
    assert open_image(write(half, tmp_path / "b.png")).getpixel((3, 3)) == (127, 127, 127)


def test_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 200, 0] + [0] * 762)
    image.putpixel((5, 5), 1)
    for suffix in ("png", "gif"):
        read = open_image(write(image, tmp_path / f"a.{suffix}", transparency=0))
        assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((5, 5)) == (0, 200, 0)


def test_a_colour_marked_as_transparent_in_rgb_is_white(tmp_path):
    image = picture(8, 8)
    image.putpixel((2, 2), (1, 2, 3))
    read = open_image(write(image, tmp_path / "a.png", transparency=(1, 2, 3)))
    assert read.getpixel((2, 2)) == (255, 255, 255)


def test_sixteen_bit_greyscale_keeps_its_tones(tmp_path):
    tones = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    for suffix in ("png", "tif"):
        read = np.asarray(open_image(write(Image.fromarray(tones), tmp_path / f"a.{suffix}")))
        assert read[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    upright = picture(48, 32)
    undo = {  # what a camera did, so that the tag turns it back
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = write(stored, tmp_path / f"a.{suffix}", exif=exif, quality=95)
    read = open_image(path)
    assert read.size == (48, 32) and distance(read, upright) < 4
    assert distance(read, ImageOps.mirror(upright)) > 30


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    path = write(first, tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    red, _, blue = open_image(path).getpixel((4, 4))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = write(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"a\.\w+ is not a picture that can be read; replace"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_damaged_bytes_give_a_picture_or_a_typed_error(tmp_path, suffix):
    path, rng = write(picture(24, 24), tmp_path / f"a.{suffix}"), random.Random(0)
    content = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except DataError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.jpg", b"no picture at all\n"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("page.png", b"<!doctype html><html><body>404</body></html>"),
    ],
)
def test_a_file_that_is_no_picture_is_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_named_like_a_picture_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    for name in ("a.png", "b.png"):
        with pytest.raises(DataError, match=name):
            open_image(tmp_path / name)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (50_000, 50_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="megapixels"):
        open_image(path)
    assert size[0] * size[1] > MAX_PIXELS


def test_the_same_seed_gives_the_same_crops_and_another_seed_others(tmp_path):
    path = write(picture(80, 60), tmp_path / "a.png")
    first, again, other = (
        torch.stack([e.pixels for e in examples_of(path, copies=5, seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_crops_leave_the_global_random_state_alone(tmp_path):
    path = write(picture(80, 60), tmp_path / "a.png")
    python, numeric, tensor = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    examples_of(path, copies=4)
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), tensor)
    assert (np.random.get_state()[1] == numeric).all()


def test_the_first_copy_is_the_centred_square_and_the_second_its_mirror_image(tmp_path):
    image = picture(96, 32)
    square, mirrored, *_ = examples_of(write(image, tmp_path / "a.png"))
    assert torch.equal(square.pixels, to_tensor(image.crop((32, 0, 64, 32))))
    assert torch.equal(mirrored.pixels, square.pixels.flip(-1))


def test_without_flip_no_two_copies_are_the_same(tmp_path):
    examples = examples_of(write(picture(96, 64), tmp_path / "a.png"), copies=4, flip=False)
    assert len({e.pixels.numpy().tobytes() for e in examples}) == 4
    assert all(e.pixels[0, :, 0].mean() < e.pixels[0, :, -1].mean() for e in examples)


def test_a_crop_stays_inside_the_picture():
    image = picture(50, 20)
    for seed in range(30):
        window = np.asarray(crop(image, (16, 16), 1.0, random.Random(seed)))
        assert window.shape == (16, 16, 3) and (window[..., 2] == 60).all()


def test_black_and_white_become_minus_one_and_one():
    pixels = to_tensor(Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8)))
    assert pixels.tolist() == [[[-1.0, 1.0]]] * 3


def test_without_a_caption_file_every_template_names_the_token(tmp_path):
    (example,) = examples_of(write(picture(8, 8), tmp_path / "a.png"), copies=1)
    assert len(example.captions) == len(TEMPLATES)
    assert all("<toy>" in caption and "{}" not in caption for caption in example.captions)


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        (b"a <toy> on grass\n", ("a <toy> on grass",)),
        (b"on grass", ("<toy>, on grass",)),
        (b"\xef\xbb\xbfa <toy>", ("a <toy>",)),
        (b" \n", tuple(t.format("<toy>") for t in TEMPLATES)),
    ],
    ids=["with token", "token is put in front", "byte order mark", "empty file counts as none"],
)
def test_a_caption_file_is_the_caption_with_the_token_in_it(tmp_path, text, captions):
    path = write(picture(8, 8), tmp_path / "a.png")
    path.with_suffix(".txt").write_bytes(text)
    (example,) = examples_of(path, copies=1)
    assert example.captions == captions
