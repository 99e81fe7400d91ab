"""The indoor scenes of the embedded world; see `world.backgrounds`."""

import numpy as np
from backdrops import BACKDROPS
from numpy.random import Generator
from PIL import Image, ImageDraw

from world.canvas import CANVAS, gradient, vary


def room(rng: Generator) -> Image.Image:
    wall = vary(rng, (224, 206, 180), 30)
    image = gradient(rng, wall, wall, 4)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 226, CANVAS, CANVAS), fill=vary(rng, (160, 112, 72)))
    for x in range(0, CANVAS, 46):
        draw.line((x, 230, x - 20, CANVAS), fill=(132, 92, 60), width=3)
    draw.rectangle((0, 220, CANVAS, 228), fill=(246, 242, 234))
    x = rng.uniform(20, 200)
    draw.rectangle((x, 30, x + 96, 128), fill=(250, 250, 250))
    draw.rectangle((x + 7, 37, x + 89, 121), fill=vary(rng, (160, 210, 244)))
    draw.line((x + 48, 37, x + 48, 121), fill=(250, 250, 250), width=6)
    draw.line((x + 7, 79, x + 89, 79), fill=(250, 250, 250), width=6)
    return image


def kitchen(rng: Generator) -> Image.Image:
    tile, grout = vary(rng, (214, 232, 236), 18), (250, 250, 250)
    image = gradient(rng, tile, tile, 3)
    draw = ImageDraw.Draw(image)
    for k in range(0, CANVAS, 40):
        draw.line((0, k, CANVAS, k), fill=grout, width=4)
        draw.line((k, 0, k, 220), fill=grout, width=4)
    draw.rectangle((0, 40, CANVAS, 52), fill=(150, 106, 70))
    for x in np.arange(20, CANVAS, 50):
        colour = vary(rng, (200, 110, 80), 60)
        draw.rectangle((x, 14, x + rng.uniform(16, 28), 40), fill=colour)
    draw.rectangle((0, 222, CANVAS, 244), fill=vary(rng, (236, 228, 214), 8))
    draw.rectangle((0, 244, CANVAS, CANVAS), fill=vary(rng, (176, 130, 92)))
    return image


def library(rng: Generator) -> Image.Image:
    image = gradient(rng, (104, 70, 46), (84, 56, 38))
    draw = ImageDraw.Draw(image)
    for shelf in (70, 148, 226):
        x = 4.0
        while x < CANVAS:
            w, h = rng.uniform(10, 20), rng.uniform(42, 62)
            draw.rectangle((x, shelf - h, x + w - 2, shelf), fill=vary(rng, (150, 100, 90), 80))
            x += w
        draw.rectangle((0, shelf, CANVAS, shelf + 10), fill=(60, 38, 26))
    draw.rectangle((0, 250, CANVAS, CANVAS), fill=vary(rng, (122, 46, 50)))
    return image


def stage(rng: Generator) -> Image.Image:
    red = vary(rng, (160, 26, 38), 16)
    image = gradient(rng, red, red, 4)
    draw = ImageDraw.Draw(image)
    for x in range(0, CANVAS, 26):
        draw.rectangle((x, 0, x + 11, 236), fill=tuple(int(c * 0.72) for c in red))
    draw.rectangle((0, 232, CANVAS, CANVAS), fill=vary(rng, (172, 122, 76)))
    x = rng.uniform(120, 200)
    draw.ellipse((x - 110, 240, x + 110, 300), fill=(244, 220, 160))
    draw.rectangle((0, 0, CANVAS, 24), fill=(206, 164, 70))
    return image


def studio(rng: Generator) -> Image.Image:
    backdrop = BACKDROPS[rng.integers(len(BACKDROPS))](CANVAS, rng)
    return Image.fromarray((backdrop * 255).round().astype(np.uint8))
