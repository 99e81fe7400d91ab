"""Parts of a picture as a judge can see them, and how well it tells them apart where the truth is
known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from world.backgrounds import FLAT_COLOURS, SCENES, draw_scene

from pair_study.plan import LEFT, RIGHT, Pair
from sbora_diffusion.diffusion.regions import Box

SIDE = 128  # of calibration pictures, as the pocket base draws them
BACKGROUNDS = {"plain": FLAT_COLOURS, "scene": SCENES}

Pixels = np.ndarray
"""(height, width, 3) uint8."""


def crop(picture: Image.Image, box: Box) -> Image.Image:
    width, height = picture.size
    bounds = (box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height)
    return picture.convert("RGB").crop(tuple(round(bound) for bound in bounds))


def halves(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right region."""
    return crop(picture, LEFT), crop(picture, RIGHT)


def _border_padded(pixels: Pixels, widths: list) -> Pixels:
    edges = (pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1])
    (top, bottom), (left, right), _ = widths
    height, width = pixels.shape[:2]
    square = np.empty((height + top + bottom, width + left + right, 3), np.uint8)
    square[:] = np.concatenate(edges).mean(0).round()
    square[top : top + height, left : left + width] = pixels
    return square


PADDINGS: dict[str, Callable[[Pixels, list], Pixels]] = {
    "border colour": _border_padded,
    "border repeated": lambda pixels, widths: np.pad(pixels, widths, "edge"),
    "mirrored": lambda pixels, widths: np.pad(pixels, widths, "symmetric"),
}
WINDOWS = "three windows"
WAYS = (*PADDINGS, WINDOWS)
"""How to make squares of a crop: judges would cut off or distort it."""


def squares(picture: Image.Image, way: str) -> list[Image.Image]:
    """The crop padded to a square, or square windows at both ends and in the middle."""
    return windows(picture) if way == WINDOWS else [padded(picture, way)]


def padded(picture: Image.Image, padding: str) -> Image.Image:
    """The whole crop in the middle of a square."""
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    missing = [max(height, width) - length for length in (height, width)]
    widths = [(m // 2, m - m // 2) for m in missing]
    return Image.fromarray(PADDINGS[padding](pixels, [*widths, (0, 0)]))


def windows(picture: Image.Image) -> list[Image.Image]:
    """Three squares as wide as the shorter side, which cover a crop of up to three squares."""
    side = min(picture.size)
    free = [length - side for length in picture.size]
    corners = [[f * k // 2 for f in free] for k in range(3)]
    return [picture.crop((x, y, x + side, y + side)) for x, y in corners]


@dataclass(frozen=True)
class Known:
    """A calibration picture.

    Attributes:
        order: the concepts on the left and on the right.
        shown: number of the reference of each.
    """

    picture: Image.Image
    order: Pair
    shown: tuple[int, int]


def calibration(
    pairs: Sequence[Pair], references: Mapping[str, Sequence[Image.Image]], rng: Generator
) -> list[Known]:
    """Two pictures a pair, on a flat colour and in a scene, the names turned around in one."""
    return [
        _known(order, references, kind, rng)
        for pair in pairs
        for order, kind in ((pair, "plain"), (pair[::-1], "scene"))
    ]


def _known(
    order: Pair, references: Mapping[str, Sequence[Image.Image]], kind: str, rng: Generator
) -> Known:
    names = list(BACKGROUNDS[kind])
    scene = draw_scene(names[int(rng.integers(len(names)))], rng)
    canvas = scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    shown = tuple(int(rng.integers(len(references[name]))) for name in order)
    for left, name, number in zip((0, SIDE // 2), order, shown, strict=True):
        size = int(rng.integers(SIDE * 3 // 8, SIDE // 2 + 1))
        x = left + int(rng.integers(SIDE // 2 - size + 1))
        y = int(rng.integers(SIDE - size + 1))
        canvas.paste(
            references[name][number].resize((size, size), Image.Resampling.LANCZOS), (x, y)
        )
    return Known(canvas, order, shown)
