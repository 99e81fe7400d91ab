"""Pictures made to hurt, and pictures that are only unusual: right pixels or one typed error.

What `tests/diffusion/test_dataset.py` holds already is not repeated here.
"""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbora_diffusion.core.errors import DataError
from sbora_diffusion.diffusion.dataset import open_image
from tests.reliability.fuzz import peak_megabytes

ROOT = Path(__file__).parents[2]
FIRST, REFUSED_MB, BYTES_A_PIXEL = 0x112, 16, 24


def chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A valid PNG of zeros, packed as tightly as it goes."""
    row = bytes(1 + width * bits // 8 * {0: 1, 2: 3, 6: 4}[colour])
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    ends = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + ends


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that ask for much memory, and files that other programs would be started for."""
    yield "bomb of 177 megapixels", png(13_300, 13_300, colour=0)
    yield "one column of 60 megapixels", png(1, 60_000_000 // 1000, colour=0)
    for kind in (b"zTXt", b"iCCP"):
        packed = zlib.compress(bytes(200 << 20), 9)
        yield f"{kind.decode()} of 200 MB", png(4, 4, extra=chunk(kind, b"a\0\0" + packed))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    yield "PostScript", postscript
    for kind in ("PPM", "TGA", "ICO", "SGI", "PDF"):
        yield kind, saved(Image.new("RGB", (32, 32)), kind)


def large() -> Iterator[tuple[str, bytes]]:
    """Pictures of 16 megapixels, each in a way that takes decoders memory."""
    for colour, bits in ((0, 16), (2, 8), (6, 8)):
        yield f"PNG {colour} {bits}", png(4000, 4000, bits, colour)
    flat = Image.new("RGB", (4000, 4000), "red")
    for kind in ("JPEG", "WEBP", "TIFF", "GIF"):
        yield kind, saved(flat, kind)
    yield "CMYK", saved(Image.new("CMYK", (4000, 4000)), "JPEG")


def measured(cases: Iterator[tuple[str, bytes]], folder: Path) -> Iterator[dict]:
    """What reading each file gave, and the most memory in MB that it took."""
    reset = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def most() -> float:
        found = peak_megabytes()
        os.write(reset, b"5")
        return found

    open_image(_file(folder, png(8, 8)))
    for name, content in cases:
        path = _file(folder, content)
        most()
        before = most()
        try:
            image = open_image(path)
            outcome = f"{image.width}x{image.height}"
        except DataError:
            outcome = "refused"
        yield {"name": name, "outcome": outcome, "mb": most() - before}


def _file(folder: Path, content: bytes) -> Path:
    (folder / "a.png").write_bytes(content)
    return folder / "a.png"


def in_a_process(which: str, folder: Path) -> list[dict]:
    """Measured in a process of its own, where nothing else takes memory."""
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tests.reliability import test_hostile_images as t\n"
        "print(json.dumps(list(t.measured(getattr(t, sys.argv[1])(), Path(sys.argv[2])))))"
    )
    command = [sys.executable, "-c", code, which, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_bombs_and_other_formats_are_refused_in_little_memory(tmp_path, record_property):
    found = in_a_process("bombs", tmp_path)
    assert [case for case in found if case["outcome"] != "refused"] == []
    assert [case for case in found if case["mb"] > REFUSED_MB] == []
    record_property("17 bombs and foreign formats refused", len(found))
    record_property("17 MB for the largest of these", round(max(c["mb"] for c in found), 1))


@pytest.mark.reliability
def test_large_pictures_take_no_more_than_a_stated_memory(tmp_path, record_property):
    found = in_a_process("large", tmp_path)
    assert [case for case in found if case["outcome"] == "refused"] == []
    assert [case for case in found if case["mb"] * (1 << 20) > 16e6 * BYTES_A_PIXEL] == []
    most = max(case["mb"] for case in found) * (1 << 20) / 16e6
    record_property("17 pictures of 16 megapixels read", len(found))
    record_property(f"17 bytes a pixel at most, of {BYTES_A_PIXEL}", round(most, 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_pictures_of_extreme_shapes_keep_their_pixels(tmp_path, size, record_property):
    image = Image.new("RGB", size, (7, 8, 9))
    image.putpixel((size[0] - 1, size[1] - 1), (1, 2, 3))
    read = open_image(_file(tmp_path, saved(image, "PNG")))
    assert read.size == size and read.getpixel((size[0] - 1, size[1] - 1)) == (1, 2, 3)
    assert max(size) == 1 or read.getpixel((0, 0)) == (7, 8, 9)
    record_property("17 pictures of extreme shapes", 1)


def test_sixteen_bits_in_colour_and_a_palette_with_alphas_keep_their_tones(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">3H", 257 * 10, 257 * 20, 257 * 30) * 4 for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = _file(tmp_path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body)
    assert open_image(path).getpixel((2, 2)) == (10, 20, 30)
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    path = _file(tmp_path, saved(image, "PNG", transparency=bytes([0, 128])))
    assert np.abs(np.subtract(open_image(path).getpixel((1, 1)), (227, 127, 127))).max() <= 1


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.reliability)])
def test_damaged_exif_gives_a_picture_or_a_typed_error(tmp_path, count, record_property):
    exif = Image.Exif()
    exif[FIRST], exif[0x10F] = 6, "maker"
    rng, read, upright = random.Random(0), 0, 0
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    for number in range(count):
        damaged = bytearray(block)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 255, rng.randrange(256)))
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
        path = tmp_path / f"a.{suffix}"
        whole = b"Exif\0\0" + bytes(damaged)
        path.write_bytes(saved(Image.new("RGB", (20, 10), "red"), kind, exif=whole))
        try:
            image = open_image(path)
        except DataError:
            continue
        read += 1
        upright += image.size == (10, 20)
        assert {image.size} <= {(20, 10), (10, 20)}
        red, green, _ = image.getpixel((5, 5))
        assert red > 240 and green < 15
    assert read > count / 2 and 0 < upright < read
    record_property("17 pictures with damaged EXIF tried", count)
