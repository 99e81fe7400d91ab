"""Procedurally drawn scenes of the embedded world: name → 160×160 RGB picture.

Each scene is one short function that draws on a 320×320 canvas; `draw_scene` halves it, so
edges are antialiased. All randomness comes from the generator that is passed in.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from world.canvas import CANVAS, SIZE, Colour, clouds, conifer, disc, gradient, ground, vary
from world.indoors import kitchen, library, room, stage, studio

FLAT_COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 216, 73),
    "green": (76, 175, 80),
    "blue": (62, 120, 214),
    "purple": (134, 84, 190),
    "pink": (246, 160, 196),
    "brown": (140, 96, 66),
    "black": (24, 24, 28),
    "white": (246, 246, 244),
    "grey": (150, 152, 156),
}


def beach(rng: Generator) -> Image.Image:
    image = gradient(rng, (104, 186, 238), (206, 236, 250))
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.38, 0.5)
    disc(draw, rng.uniform(20, 300), rng.uniform(25, 70), 20, (255, 236, 150))
    draw.rectangle((0, horizon * CANVAS, CANVAS, CANVAS), fill=vary(rng, (38, 142, 196)))
    for _ in range(8):
        x, y = rng.uniform(0, CANVAS), rng.uniform(horizon * CANVAS + 5, 0.66 * CANVAS)
        draw.line((x, y, x + 36, y), fill=(130, 204, 232), width=3)
    ground(draw, rng, 0.69, (240, 246, 246), 0.02)
    ground(draw, rng, 0.71, vary(rng, (238, 212, 150)), 0.02)
    return image


def snow(rng: Generator) -> Image.Image:
    image = gradient(rng, (150, 184, 222), (220, 232, 246))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 8)):
        conifer(draw, rng.uniform(0, CANVAS), 205, rng.uniform(60, 120), (120, 158, 160))
    ground(draw, rng, rng.uniform(0.52, 0.6), (226, 236, 248), 0.03)
    ground(draw, rng, rng.uniform(0.68, 0.75), (246, 250, 255), 0.03)
    for x, y, r in zip(*rng.uniform(0, CANVAS, (2, 70)), rng.uniform(1.5, 4, 70), strict=True):
        disc(draw, x, y, r, (255, 255, 255))
    return image


def forest(rng: Generator) -> Image.Image:
    image = gradient(rng, (150, 196, 150), (60, 110, 64))
    draw = ImageDraw.Draw(image)
    for base, shade in ((190, 0.75), (220, 0.9), (245, 1.0)):
        for _ in range(rng.integers(5, 9)):
            green = vary(rng, tuple(int(c * shade) for c in (42, 112, 58)))
            conifer(draw, rng.uniform(-10, CANVAS + 10), base, rng.uniform(120, 210), green)
    ground(draw, rng, 0.74, vary(rng, (74, 92, 46)), 0.015)
    return image


def city_at_night(rng: Generator) -> Image.Image:
    image = gradient(rng, (14, 16, 46), (58, 44, 96))
    draw = ImageDraw.Draw(image)
    disc(draw, rng.uniform(30, 290), rng.uniform(25, 60), 16, (244, 240, 210))
    x = -10.0
    while x < CANVAS:
        w, top = rng.uniform(34, 62), rng.uniform(60, 180)
        draw.rectangle((x, top, x + w, CANVAS), fill=vary(rng, (30, 32, 58), 8))
        for wx in np.arange(x + 6, x + w - 8, 13):
            for wy in np.arange(top + 8, 250, 16):
                if rng.random() < 0.55:
                    draw.rectangle((wx, wy, wx + 6, wy + 8), fill=vary(rng, (250, 214, 110)))
        x += w + rng.uniform(0, 6)
    draw.rectangle((0, 258, CANVAS, CANVAS), fill=(38, 38, 50))
    return image


def desert(rng: Generator) -> Image.Image:
    image = gradient(rng, (250, 186, 104), (252, 226, 170))
    draw = ImageDraw.Draw(image)
    disc(draw, rng.uniform(40, 280), rng.uniform(40, 90), 24, (255, 244, 200))
    ground(draw, rng, 0.55, vary(rng, (226, 160, 92)), 0.05)
    for _ in range(rng.integers(1, 4)):
        x, base, h = rng.uniform(10, 310), rng.uniform(185, 215), rng.uniform(50, 90)
        for dx, low, high in (
            (0, 0, h),
            (-h * 0.25, h * 0.4, h * 0.75),
            (h * 0.25, h * 0.3, h * 0.65),
        ):
            draw.line((x + dx, base - low, x + dx, base - high), fill=(72, 140, 82), width=12)
        draw.line((x - h * 0.25, base - h * 0.4, x + h * 0.25, base - h * 0.35), (72, 140, 82), 10)
    ground(draw, rng, 0.7, vary(rng, (240, 184, 112)), 0.04)
    return image


def under_water(rng: Generator) -> Image.Image:
    image = gradient(rng, (70, 190, 214), (10, 62, 122))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x = rng.uniform(0, CANVAS)
        draw.polygon([(x, 0), (x + 26, 0), (x - 40, 250), (x - 90, 250)], fill=(92, 198, 216))
    image = image.filter(ImageFilter.GaussianBlur(9))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 7)):
        xs = rng.uniform(0, CANVAS) + 8 * np.sin(np.arange(12) + rng.uniform(0, 6))
        ys = np.linspace(300, rng.uniform(150, 230), 12)
        draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=(40, 140, 92), width=9)
    for x, y, r in zip(*rng.uniform(0, CANVAS, (2, 16)), rng.uniform(3, 8, 16), strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(200, 240, 248), width=2)
    ground(draw, rng, 0.86, vary(rng, (196, 180, 130)), 0.02)
    return image


def meadow(rng: Generator) -> Image.Image:
    image = gradient(rng, (110, 188, 246), (214, 238, 252))
    draw = ImageDraw.Draw(image)
    clouds(draw, rng)
    ground(draw, rng, rng.uniform(0.5, 0.58), vary(rng, (112, 178, 84)), 0.03)
    ground(draw, rng, rng.uniform(0.64, 0.7), vary(rng, (132, 200, 80)), 0.03)
    petals = ((250, 90, 110), (255, 220, 90), (250, 250, 250), (180, 110, 220))
    for x, y in zip(rng.uniform(0, CANVAS, 34), rng.uniform(232, 316, 34), strict=True):
        disc(draw, x, y, rng.uniform(3, 5), petals[rng.integers(4)])
    return image


def space(rng: Generator) -> Image.Image:
    image = gradient(rng, (8, 8, 28), (22, 10, 46))
    draw = ImageDraw.Draw(image)
    disc(draw, rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), 60, vary(rng, (70, 34, 110), 30))
    image = image.filter(ImageFilter.GaussianBlur(26))
    draw = ImageDraw.Draw(image)
    for x, y, r in zip(*rng.uniform(0, CANVAS, (2, 80)), rng.uniform(1, 2.6, 80), strict=True):
        disc(draw, x, y, r, (255, 255, 240))
    x, y, r = rng.uniform(30, 290), rng.uniform(30, 110), rng.uniform(18, 34)
    planet = vary(rng, (206, 140, 92), 50)
    disc(draw, x, y, r, planet)
    draw.ellipse(
        (x - 1.7 * r, y - 0.35 * r, x + 1.7 * r, y + 0.35 * r), outline=(230, 214, 180), width=4
    )
    return image


def mountains_at_sunset(rng: Generator) -> Image.Image:
    image = gradient(rng, (96, 66, 140), (255, 176, 110))
    draw = ImageDraw.Draw(image)
    disc(draw, rng.uniform(60, 260), 150, 28, (255, 226, 150))
    for base, shade in ((230, (132, 84, 128)), (260, (88, 58, 104))):
        for x in np.arange(-40, CANVAS, rng.uniform(70, 110)):
            w, h = rng.uniform(70, 110), rng.uniform(80, 150)
            draw.polygon(
                [(x - w, base), (x + rng.uniform(-10, 10), base - h), (x + w, base)], shade
            )
    draw.rectangle((0, 226, CANVAS, CANVAS), fill=vary(rng, (64, 46, 76), 8))
    return image


def street(rng: Generator) -> Image.Image:
    image = gradient(rng, (150, 204, 244), (226, 238, 246))
    draw = ImageDraw.Draw(image)
    x = -6.0
    while x < CANVAS:
        w, top = rng.uniform(56, 90), rng.uniform(40, 110)
        draw.rectangle((x, top, x + w, 226), fill=vary(rng, (206, 138, 104), 45))
        for wx in np.arange(x + 9, x + w - 14, 24):
            for wy in np.arange(top + 12, 200, 34):
                draw.rectangle((wx, wy, wx + 13, wy + 19), fill=(236, 244, 250))
        x += w + 3
    draw.rectangle((0, 222, CANVAS, 242), fill=(196, 194, 190))
    draw.rectangle((0, 242, CANVAS, CANVAS), fill=vary(rng, (92, 94, 100), 8))
    for x in range(int(rng.integers(0, 40)) - 40, CANVAS, 64):
        draw.rectangle((x, 276, x + 36, 284), fill=(244, 236, 200))
    return image


def farm(rng: Generator) -> Image.Image:
    image = gradient(rng, (140, 200, 246), (236, 240, 220))
    draw = ImageDraw.Draw(image)
    clouds(draw, rng)
    ground(draw, rng, 0.55, vary(rng, (206, 182, 88)), 0.01)
    for k in np.linspace(-300, CANVAS + 300, 16):
        draw.line((160 + (k - 160) * 0.25, 190, k, CANVAS), fill=(176, 150, 64), width=5)
    x = rng.uniform(20, 200)
    draw.rectangle((x, 108, x + 90, 184), fill=vary(rng, (186, 52, 46), 10))
    draw.polygon([(x - 8, 110), (x + 45, 64), (x + 98, 110)], fill=(120, 40, 38))
    draw.rectangle((x + 30, 138, x + 60, 184), fill=(246, 240, 230))
    return image


def volcano(rng: Generator) -> Image.Image:
    image = gradient(rng, (44, 22, 34), (150, 56, 36))
    draw = ImageDraw.Draw(image)
    x = rng.uniform(90, 230)
    draw.polygon([(x - 150, 240), (x - 26, 70), (x + 26, 70), (x + 150, 240)], fill=(58, 42, 44))
    for _ in range(3):
        xs = np.linspace(x, x + rng.uniform(-90, 90), 6) + rng.uniform(-6, 6, 6)
        pts = list(zip(xs.tolist(), np.linspace(70, 238, 6).tolist(), strict=True))
        draw.line(pts, fill=(255, 120, 30), width=10)
    for px, py in zip(rng.normal(x, 40, 22), rng.uniform(0, 70, 22), strict=True):
        disc(draw, px, py, rng.uniform(2, 6), vary(rng, (255, 170, 60), 30))
    ground(draw, rng, 0.73, vary(rng, (46, 34, 36), 6), 0.02)
    return image


def rain(rng: Generator) -> Image.Image:
    image = gradient(rng, (84, 96, 112), (150, 160, 170))
    draw = ImageDraw.Draw(image)
    clouds(draw, rng, (112, 122, 136))
    ground(draw, rng, 0.68, vary(rng, (92, 104, 104), 8), 0.01)
    for _ in range(5):
        x, y = rng.uniform(0, CANVAS), rng.uniform(240, 310)
        draw.ellipse((x - 36, y - 7, x + 36, y + 7), fill=(140, 158, 172))
    for x, y in zip(rng.uniform(0, 340, 90), rng.uniform(-10, CANVAS, 90), strict=True):
        draw.line((x, y, x - 7, y + 20), fill=(196, 210, 224), width=2)
    return image


def castle(rng: Generator) -> Image.Image:
    image = gradient(rng, (128, 186, 236), (232, 236, 240))
    draw = ImageDraw.Draw(image)
    clouds(draw, rng)
    stone, dark = vary(rng, (166, 162, 158), 12), (96, 92, 92)
    draw.rectangle((50, 110, 270, 240), fill=stone)
    for x in range(50, 270, 30):
        draw.rectangle((x, 96, x + 16, 112), fill=stone)
    for x in (26, 230):
        draw.rectangle((x, 66, x + 62, 240), fill=vary(rng, (150, 146, 144), 8))
        roof = vary(rng, (170, 60, 64), 30)
        draw.polygon([(x - 8, 68), (x + 31, 14), (x + 70, 68)], fill=roof)
        draw.rectangle((x + 24, 96, x + 38, 122), fill=dark)
    draw.pieslice((128, 150, 192, 330), 180, 360, fill=dark)
    ground(draw, rng, 0.73, vary(rng, (110, 168, 84)), 0.01)
    return image


SCENES: dict[str, Callable[[Generator], Image.Image]] = {
    f.__name__: f
    for f in (
        beach, snow, forest, city_at_night, desert, under_water, meadow, space,
        mountains_at_sunset, room, kitchen, street, library, farm, volcano, rain, castle, stage,
        studio,
    )
}  # fmt: skip


def flat_colour(name: str, rng: Generator) -> Image.Image:
    """A plain backdrop of one colour, slightly lighter at the top."""
    colour = FLAT_COLOURS[name]
    lighter = tuple(min(255, c + 12) for c in colour)
    return gradient(rng, lighter, colour, 8)


def draw_scene(name: str, rng: Generator) -> Image.Image:
    """One variant of a scene or flat colour, 160×160 RGB."""
    image = flat_colour(name, rng) if name in FLAT_COLOURS else SCENES[name](rng)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
