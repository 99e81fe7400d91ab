"""Compose scenes from sprites and backgrounds, in batches, on any device.

A `ScenePlan` is small (numbers only) and is drawn on the CPU together with its caption;
`Composer` turns a batch of plans into pictures where the model trains.
"""

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from world.backgrounds import FLAT_COLOURS, SCENES, SIZE, draw_scene
from world.captions import caption

IMAGE_SIZE = 128
LAYERS = 3  # two subjects and one accessory
WEARERS = ("animal", "person", "face", "toy", "character")
GROUNDED = sorted(set(SCENES) - {"space", "under_water"})


@dataclass(frozen=True)
class Sprite:
    noun: str
    kind: str  # "subject" | "accessory"
    style: str
    category: str
    top: float  # upper edge of the visible part, −1..1 in sprite coordinates
    head: float  # horizontal centre of its upper fifth, −1..1
    half_width: float


@dataclass(frozen=True)
class SpriteBank:
    """All sprites: pixels (N, 4, 96, 96) uint8 and one `Sprite` each."""

    pixels: Tensor
    sprites: list[Sprite]

    @classmethod
    def load(cls, folder: Path) -> "SpriteBank":
        """Read `sprites.json` and `sprites.bin` as `pack_sprites.py` writes them."""
        entries = json.loads((folder / "sprites.json").read_text())["sprites"]
        blob = (folder / "sprites.bin").read_bytes()
        pixels = np.stack([_decode(blob[e["offset"] : e["offset"] + e["length"]]) for e in entries])
        sprites = [_describe(e, a) for e, a in zip(entries, pixels[:, 3], strict=True)]
        return cls(torch.from_numpy(pixels), sprites)


def _decode(webp: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(webp)).convert("RGBA")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _describe(entry: dict, alpha: np.ndarray) -> Sprite:
    rows, columns = np.nonzero(alpha.max(1) > 60)[0], np.nonzero(alpha.max(0) > 60)[0]
    upper = alpha[rows[0] : rows[0] + max(1, len(rows) // 5)].astype(np.float64).sum(0)
    size = alpha.shape[0]
    head = float((upper * np.arange(size)).sum() / upper.sum())
    return Sprite(
        noun=entry["noun"],
        kind=entry["kind"],
        style=entry["style"],
        category=entry["category"],
        top=2 * rows[0] / size - 1,
        head=2 * head / size - 1,
        half_width=(columns[-1] - columns[0]) / size,
    )


@dataclass(frozen=True)
class ScenePlan:
    """What one picture shows. `layers` rows: sprite (−1: none), x, y, scale, angle, mirror."""

    caption: str
    layers: np.ndarray  # (LAYERS, 6) float32
    background: np.ndarray  # (6,) float32: variant index, crop x, crop y, flip, light, shadow


class ScenePlanner:
    """Draws scene plans; nouns are drawn evenly, then one of their sprites."""

    def __init__(self, sprites: list[Sprite], variants: int, scenes: list[str] | None = None):
        self.scenes = scenes or [*SCENES, *FLAT_COLOURS]
        self.weights = np.array([1.0 if s in SCENES else 0.45 for s in self.scenes])
        self.weights /= self.weights.sum()
        self.variants = variants
        self.sprites = sprites
        self.subjects = _by_noun(sprites, "subject")
        self.accessories = _by_noun(sprites, "accessory")
        self.nouns = sorted(self.subjects)

    def plan(self, rng: Generator) -> ScenePlan:
        scene_id = int(rng.choice(len(self.scenes), p=self.weights))
        chosen = self._subjects(rng, 2 if rng.random() < 0.26 else 1)
        layers = np.full((LAYERS, 6), -1, np.float32)
        for row, (sprite, x) in enumerate(zip(chosen, _columns(rng, len(chosen)), strict=True)):
            layers[row] = self._placement(rng, sprite, x, crowded=len(chosen) > 1)
        wears = self.sprites[chosen[0]].category in WEARERS and rng.random() < 0.3
        accessory = self._dress(rng, layers) if wears and len(chosen) == 1 else None
        styles = {self.sprites[s].style for s in chosen}
        words = caption(
            [self.sprites[s].noun for s in chosen],
            accessory,
            styles.pop() if len(styles) == 1 else None,
            self.scenes[scene_id],
            rng,
        )
        return ScenePlan(words, layers, self._background(rng, scene_id))

    def _subjects(self, rng: Generator, count: int) -> list[int]:
        """Sprites of different nouns; a pair shares its style where both nouns have it."""
        first, *others = rng.choice(len(self.nouns), count, replace=False)
        chosen = [_pick(rng, self.subjects[self.nouns[first]])]
        for noun in others:
            options = self.subjects[self.nouns[noun]]
            style = self.sprites[chosen[0]].style
            same = [s for s in options if self.sprites[s].style == style]
            chosen.append(_pick(rng, same or options))
        return chosen

    def _placement(self, rng: Generator, sprite: int, x: float, crowded: bool) -> tuple:
        scale = rng.uniform(0.38, 0.52) if crowded else rng.uniform(0.45, 0.88)
        lowest = 0.94 - scale
        y = rng.uniform(min(0.05, lowest), lowest)
        x = float(np.clip(x, scale - 1.05, 1.05 - scale))
        return sprite, x, y, scale, rng.normal(0, 0.08), float(rng.random() < 0.5)

    def _dress(self, rng: Generator, layers: np.ndarray) -> str:
        """Put an accessory on the first subject's head; returns its noun."""
        noun = sorted(self.accessories)[rng.integers(len(self.accessories))]
        item = _pick(rng, self.accessories[noun])
        sprite, x, _, _, _, mirror = layers[0]
        body = self.sprites[int(sprite)]
        scale = float(rng.uniform(0.45, 0.62))
        y = 0.92 - scale
        size = float(np.clip(0.62 * body.half_width, 0.34, 0.6)) * scale * 1.15
        head = (-body.head if mirror > 0 else body.head) * scale
        drop = {"hat": -0.62, "crown": -0.5, "headphones": 0.25, "glasses": 0.75, "scarf": 1.3}
        layers[0, 2:5] = y, scale, 0.0
        above = y + body.top * scale + drop.get(noun, -0.5) * size
        layers[2] = item, x + head, above, size, rng.normal(0, 0.05), mirror
        return noun

    def _background(self, rng: Generator, scene: int) -> np.ndarray:
        variant = scene * self.variants + rng.integers(self.variants)
        margin = SIZE - IMAGE_SIZE
        shadow = float(self.scenes[scene] in GROUNDED or rng.random() < 0.5)
        crop = rng.integers(0, margin + 1, 2)
        return np.array(
            [variant, *crop, rng.random() < 0.5, rng.uniform(0.88, 1.1), shadow], np.float32
        )


def _by_noun(sprites: list[Sprite], kind: str) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, sprite in enumerate(sprites):
        if sprite.kind == kind:
            table.setdefault(sprite.noun, []).append(index)
    return table


def _pick(rng: Generator, options: list[int]) -> int:
    return options[rng.integers(len(options))]


def _columns(rng: Generator, count: int) -> list[float]:
    if count == 1:
        return [rng.normal(0, 0.22)]
    gap = rng.uniform(0.42, 0.5)
    return [-gap, gap]


def _draw_variants(job: tuple[str, int, int]) -> np.ndarray:
    name, variants, seed = job
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    return np.stack([np.asarray(draw_scene(name, rng)) for _ in range(variants)])


class Composer:
    """Renders plans: backgrounds (V, 3, 160, 160) and sprites (N, 4, 96, 96) live on `device`."""

    def __init__(self, bank: SpriteBank, planner: ScenePlanner, seed: int, device: torch.device):
        jobs = [(name, planner.variants, seed) for name in planner.scenes]
        with ProcessPoolExecutor() as pool:
            drawn = np.concatenate(list(pool.map(_draw_variants, jobs)))
        self.backgrounds = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous().to(device)
        self.sprites = bank.pixels.to(device)
        self.device = device

    @torch.no_grad()
    def compose(self, layers: Tensor, background: Tensor) -> Tensor:
        """Plans (B, LAYERS, 6) and (B, 6) → pictures (B, 3, 128, 128) in [−1, 1]."""
        layers, background = layers.to(self.device), background.to(self.device)
        canvas = self._backdrop(background)
        for row in range(LAYERS):
            placed = layers[:, row]
            present = (placed[:, 0] >= 0).float()[:, None, None, None]
            if row < 2:
                canvas = canvas * (1 - present * self._shadow(placed, background[:, 5]))
            layer = self._place(placed) * present
            canvas = canvas * (1 - layer[:, 3:]) + layer[:, :3]
        return canvas * 2 - 1

    def _backdrop(self, background: Tensor) -> Tensor:
        chosen = self.backgrounds[background[:, 0].long()]
        centre = (background[:, 1:3] * 2 + IMAGE_SIZE) / SIZE - 1
        span = IMAGE_SIZE / SIZE
        flip = 1 - 2 * background[:, 3]
        theta = torch.zeros(len(chosen), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1] = span * flip, span
        theta[:, 0, 2], theta[:, 1, 2] = centre[:, 0], centre[:, 1]
        cropped = _sample(chosen.float() / 255, theta)
        return (cropped * background[:, 4, None, None, None]).clamp(0, 1)

    def _place(self, placed: Tensor) -> Tensor:
        """Premultiplied RGBA (B, 4, 128, 128) of one layer."""
        _, x, y, scale, angle, mirror = placed.unbind(1)
        pixels = self.sprites[placed[:, 0].clamp_min(0).long()].float() / 255
        pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
        scale = scale.clamp_min(0.05)
        sign = 1 - 2 * mirror.clamp_min(0)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        first = torch.stack([cos * sign, sin * sign, -(cos * x + sin * y) * sign], 1)
        second = torch.stack([-sin, cos, sin * x - cos * y], 1)
        return _sample(pixels, torch.stack([first, second], 1))

    def _shadow(self, placed: Tensor, strength: Tensor) -> Tensor:
        """A soft ellipse under the subject, (B, 1, 128, 128) in 0..0.4."""
        axis = (torch.arange(IMAGE_SIZE, device=self.device) + 0.5) * 2 / IMAGE_SIZE - 1
        x, y, scale = (placed[:, k, None, None] for k in (1, 2, 3))
        scale = scale.clamp_min(0.05)
        dx = (axis[None, None, :] - x) / (0.75 * scale)
        dy = (axis[None, :, None] - (y + 0.93 * scale)) / (0.16 * scale)
        return (0.4 * strength[:, None, None] * torch.exp(-2 * (dx**2 + dy**2)))[:, None]


def _sample(pixels: Tensor, theta: Tensor) -> Tensor:
    size = [len(pixels), pixels.shape[1], IMAGE_SIZE, IMAGE_SIZE]
    grid = F.affine_grid(theta, size, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)
