"""Procedural studio backdrops: paper, sweep, wood, fabric, tiles, glow.

Reference images stand on them; in the world they are one scene, the studio. Every function
returns float RGB in 0..1 of shape (size, size, 3) and draws from the generator that it is given.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

Backdrop = Callable[[int, np.random.Generator], np.ndarray]


def colour(rng: np.random.Generator, saturation: float, value: float) -> np.ndarray:
    """A random hue at about this saturation and value."""
    jitter = rng.uniform(-0.08, 0.08, 2)
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), saturation + jitter[0], value + jitter[1]))


def noise(size: int, blur: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (size, size) of unit deviation; `blur` in pixels along x and y."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]
    kernel = np.exp(-2 * np.pi**2 * ((fx * blur[0]) ** 2 + (fy * blur[1]) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * kernel).real
    return (smooth - smooth.mean()) / (smooth.std() + 1e-6)


def shaded(base: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A colour (3,) or picture (size, size, 3) made lighter and darker by a field (size, size)."""
    return np.clip(base * (1.0 + field[..., None]), 0, 1)


def ramp(size: int, rng: np.random.Generator) -> np.ndarray:
    """A linear ramp 0..1 (size, size) in a random direction."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    field = np.cos(angle) * x + np.sin(angle) * y
    return (field - field.min()) / np.ptp(field)


def paper(size: int, rng: np.random.Generator) -> np.ndarray:
    grain = 0.012 * noise(size, (0.8, 0.8), rng) + 0.02 * noise(size, (20, 20), rng)
    return shaded(colour(rng, 0.38, 0.86), grain + 0.15 * (ramp(size, rng) - 0.5))


def sweep(size: int, rng: np.random.Generator) -> np.ndarray:
    """A studio sweep: wall above, lighter floor below, no hard edge between them."""
    wall = colour(rng, 0.25, 0.62)
    floor = np.clip(wall * rng.uniform(1.15, 1.4), 0, 1)
    y = np.linspace(0, 1, size)[:, None, None]
    blend = 1 / (1 + np.exp(-(y - rng.uniform(0.55, 0.7)) * 14))
    picture = np.broadcast_to(wall * (1 - blend) + floor * blend, (size, size, 3))
    return shaded(picture, 0.12 * (ramp(size, rng) - 0.5))


def glow(size: int, rng: np.random.Generator) -> np.ndarray:
    """A soft spot of light on a coloured wall, two hues."""
    y, x = np.mgrid[0:size, 0:size] / size
    centre = rng.uniform(0.3, 0.7, 2)
    light = np.exp(-(((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 0.16))[..., None]
    return np.clip(colour(rng, 0.5, 0.5) * (1 - light) + colour(rng, 0.2, 0.95) * light, 0, 1)


def wood(size: int, rng: np.random.Generator) -> np.ndarray:
    """Planks side by side, each with its own tone and a grain along it."""
    base = np.array([0.66, 0.47, 0.30]) * rng.uniform(0.7, 1.25)
    planks = int(rng.integers(4, 7))
    which = np.arange(size) * planks // size
    tone = rng.uniform(-0.1, 0.1, planks)[which][:, None]
    seam = -0.35 * (np.diff(which, prepend=0) > 0)[:, None]
    field = tone + seam + 0.07 * noise(size, (40, 0.6), rng) + np.zeros((size, size))
    return shaded(base, field if rng.uniform() < 0.5 else field.T)


def fabric(size: int, rng: np.random.Generator) -> np.ndarray:
    """A woven cloth with soft folds."""
    y, x = np.mgrid[0:size, 0:size]
    weave = 0.04 * np.sign(np.sin(x * np.pi / 3) * np.sin(y * np.pi / 3))
    return shaded(colour(rng, 0.5, 0.6), weave + 0.10 * noise(size, (30, 12), rng))


def tiles(size: int, rng: np.random.Generator) -> np.ndarray:
    """Square tiles of one hue with light joints."""
    count = int(rng.integers(4, 7))
    cell = size // count + 1
    tone = rng.uniform(-0.07, 0.07, (count + 1, count + 1))
    index = np.arange(size) // cell
    joint = (np.arange(size) % cell) < max(2, size // 100)
    picture = shaded(colour(rng, 0.35, 0.72), tone[np.ix_(index, index)])
    picture[joint[:, None] | joint[None, :]] = 0.9
    return shaded(picture, 0.12 * (ramp(size, rng) - 0.5))


def stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    """Wall paper of two pale colours."""
    y, x = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(-0.6, 0.6)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi * rng.integers(4, 8))
    blend = 1 / (1 + np.exp(-wave * 12))[..., None]
    return colour(rng, 0.2, 0.9) * blend + colour(rng, 0.35, 0.78) * (1 - blend)


BACKDROPS: tuple[Backdrop, ...] = (paper, sweep, glow, wood, fabric, tiles, stripes)
