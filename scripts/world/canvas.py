"""Drawing helpers for the scenes: a 320×320 canvas, colours that vary, ground, clouds, trees."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

SIZE = 160
CANVAS = 2 * SIZE
Colour = tuple[int, int, int]


def vary(rng: Generator, colour: Colour, amount: int = 14) -> Colour:
    jitter = rng.integers(-amount, amount + 1, 3)
    return tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(colour, jitter, strict=True))


def gradient(rng: Generator, top: Colour, bottom: Colour, amount: int = 14) -> Image.Image:
    a, b = (np.array(vary(rng, c, amount), np.float32) for c in (top, bottom))
    ramp = np.linspace(0, 1, CANVAS, dtype=np.float32)[:, None, None]
    rows = a * (1 - ramp) + b * ramp
    return Image.fromarray(np.broadcast_to(rows, (CANVAS, CANVAS, 3)).astype(np.uint8))


def ground(
    draw: ImageDraw.ImageDraw, rng: Generator, y: float, colour: Colour, bump: float
) -> None:
    """A wavy band of ground from height `y` (share of the picture) down."""
    phase, waves = rng.uniform(0, 6.28), rng.uniform(0.5, 1.6)
    xs = np.arange(0, CANVAS + 8, 8)
    ys = y * CANVAS + bump * CANVAS * np.sin(phase + waves * 6.28 * xs / CANVAS)
    draw.polygon(
        [(0, CANVAS), *zip(xs.tolist(), ys.tolist(), strict=True), (CANVAS, CANVAS)], colour
    )


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def clouds(draw: ImageDraw.ImageDraw, rng: Generator, colour: Colour = (250, 252, 255)) -> None:
    for _ in range(rng.integers(1, 4)):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(20, 90), rng.uniform(10, 18)
        for k in range(4):
            disc(draw, x + k * r, y + rng.uniform(-4, 4), r, colour)


def conifer(draw: ImageDraw.ImageDraw, x: float, base: float, h: float, colour: Colour) -> None:
    draw.rectangle((x - h * 0.04, base - h * 0.2, x + h * 0.04, base), fill=(92, 64, 44))
    for k in range(3):
        top, low, w = base - h + k * h * 0.22, base - h * 0.55 + k * h * 0.22, h * (0.16 + 0.07 * k)
        draw.polygon([(x, top), (x - w, low), (x + w, low)], fill=colour)
