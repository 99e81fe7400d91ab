"""Scene plans: what a picture shows, drawn on the CPU together with its caption.

A plan is small (numbers and words only); `world.compose.Composer` turns a batch of plans into
pictures where the model trains.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from world.backgrounds import FLAT_COLOURS, SCENES, SIZE
from world.captions import RELATIONS, Mention, caption
from world.drawing_styles import DRAWING_STYLES
from world.sprites import COLOURS, Sprite

IMAGE_SIZE = 128
SUBJECTS = 3
LAYERS = SUBJECTS + 1  # and one accessory
WEARERS = ("animal", "person", "face", "character")
WEARING_TOYS = ("doll", "teddy bear", "snowman", "robot")
GROUNDED = sorted(set(SCENES) - {"space", "under_water"})
HOW_MANY = (0.58, 0.9)  # cumulative: one subject, two, else three
HELD_OUT_SHARE = 0.25  # of the judge's subjects
DROP = {"hat": -0.62, "crown": -0.5, "headphones": 0.25, "glasses": 0.75, "scarf": 1.3}


def reserved(noun: str, scene: str) -> bool:
    """Whether a subject is never put into this scene in training: a twelfth of all pairs."""
    return scene in SCENES and zlib.crc32(f"{noun}|{scene}".encode()) % 12 == 0


@dataclass(frozen=True)
class ScenePlan:
    """What one picture shows.

    Attributes:
        layers: (LAYERS, 7) float32: sprite (−1: none), x, y, scale, angle, mirror,
            tint (−1: none, else index into `COLOURS`).
        background: (7,) float32: variant index, crop x, crop y, flip, light, shadow,
            drawing style (−1: none).
    """

    caption: str
    mentions: tuple[Mention, ...]
    relation: str
    scene: str
    drawn: str | None
    layers: np.ndarray
    background: np.ndarray


class ScenePlanner:
    """Draws scene plans; nouns are drawn evenly, then one of their sprites."""

    def __init__(self, sprites: list[Sprite], variants: int):
        self.scenes = [*SCENES, *FLAT_COLOURS]
        weights = np.array([1.0 if s in SCENES else 0.45 for s in self.scenes])
        self.scene_share = np.cumsum(weights / weights.sum())
        self.variants = variants
        self.sprites = sprites
        self.subjects = _by_noun(sprites, "subject")
        self.accessories = _by_noun(sprites, "accessory")
        self.nouns = sorted(self.subjects)
        self.held_out = _held_out(sprites)
        self.photographed = {s.noun for s in sprites if s.style == "photo"}

    def plan(
        self,
        rng: Generator,
        count: int | None = None,
        worn: bool | None = None,
        rare: bool = False,
        drawn: bool = True,
    ) -> ScenePlan:
        """One scene.

        Args:
            count: number of subjects; drawn at random by default.
            worn: whether the first subject wears something, likewise.
            rare: only subjects and scenes that are never together in training (`reserved`).
            drawn: whether the picture may be redrawn in a drawing style.
        """
        if count is None:
            count = 1 + int(np.searchsorted(HOW_MANY, rng.random()))
        chosen = self._subjects(rng, count, bool(worn))
        while rare and not self._rarely_seen(chosen[0]):
            chosen = self._subjects(rng, count, bool(worn))
        scene = self._scene(rng, [self.sprites[s].noun for s in chosen], rare)
        relation = self._relation(rng) if count == 2 else "next to"
        mentions = [self._mention(rng, self.sprites[s], count) for s in chosen]
        layers = np.full((LAYERS, 7), -1, np.float32)
        layers[:count, :6] = self._placements(rng, chosen, relation, mentions[0].size)
        for row, sprite in enumerate(chosen):
            mentions[row] = self._paint(rng, layers[row], self.sprites[sprite], mentions[row])
        if self._dresses(rng, chosen, worn):
            accessory = self._dress(rng, layers, alone=count == 1)
            mentions[0] = Mention(mentions[0].noun, mentions[0].size, mentions[0].colour, accessory)
        style = self._style(rng) if drawn else -1
        words = caption(
            mentions,
            relation,
            self._art(rng, chosen),
            DRAWING_STYLES[style] if style >= 0 else None,
            self.scenes[scene],
            rng,
        )
        return ScenePlan(
            words,
            tuple(mentions),
            relation,
            self.scenes[scene],
            DRAWING_STYLES[style] if style >= 0 else None,
            layers,
            self._background(rng, scene, style),
        )

    def _rarely_seen(self, sprite: int) -> bool:
        """Whether some scene is reserved for this subject; a fifth of the nouns have none."""
        return any(reserved(self.sprites[sprite].noun, scene) for scene in SCENES)

    def _scene(self, rng: Generator, nouns: list[str], rare: bool) -> int:
        while True:
            scene = int(np.searchsorted(self.scene_share, rng.random()))
            name = self.scenes[scene]
            if rare and name in SCENES and reserved(nouns[0], name):
                return scene
            if not rare and not any(reserved(noun, name) for noun in nouns):
                return scene

    def _subjects(self, rng: Generator, count: int, wearer: bool) -> list[int]:
        """Sprites of different nouns; those after the first share its style where they can."""
        chosen: list[int] = []
        while len(chosen) < count:
            options = self._options(rng)
            if any(self.sprites[options[0]].noun == self.sprites[c].noun for c in chosen):
                continue
            if chosen:
                style = self.sprites[chosen[0]].style
                options = [s for s in options if self.sprites[s].style == style] or options
            pick = _pick(rng, options)
            if chosen or not wearer or self._can_wear(pick):
                chosen.append(pick)
        return chosen

    def _options(self, rng: Generator) -> list[int]:
        if self.held_out and rng.random() < HELD_OUT_SHARE:
            return self.held_out[int(rng.random() * len(self.held_out))]
        return self.subjects[self.nouns[int(rng.random() * len(self.nouns))]]

    def _can_wear(self, sprite: int) -> bool:
        body = self.sprites[sprite]
        return body.category in WEARERS or body.noun in WEARING_TOYS

    def _mention(self, rng: Generator, sprite: Sprite, count: int) -> Mention:
        noun = sprite.noun
        if sprite.held_out and rng.random() < 0.5:
            noun = f"{sprite.held_out} {noun}"
        size = None
        if count == 1 and rng.random() < 0.14:
            size = "small" if rng.random() < 0.5 else "big"
        return Mention(noun, size)

    def _paint(
        self, rng: Generator, layer: np.ndarray, sprite: Sprite, mention: Mention
    ) -> Mention:
        """Tint some subjects, and name the colour that others have by nature."""
        roll = rng.random()
        if roll < 0.16 and sprite.held_out is None:
            tint = int(rng.random() * len(COLOURS))
            layer[6] = tint
            return Mention(mention.noun, mention.size, COLOURS[tint])
        if roll > 0.75 and sprite.colour:
            return Mention(mention.noun, mention.size, sprite.colour)
        return mention

    def _relation(self, rng: Generator) -> str:
        roll = rng.random()
        return tuple(RELATIONS)[0 if roll < 0.64 else 1 if roll < 0.82 else 2]

    def _placements(
        self, rng: Generator, chosen: list[int], relation: str, size: str | None
    ) -> np.ndarray:
        """(count, 6): sprite, x, y, scale, angle, mirror."""
        if len(chosen) == 2 and relation != "next to":
            places = self._stacked(rng, chosen, first_above=relation == "on top of")
        else:
            places = self._side_by_side(rng, len(chosen), size)
        turns = [(rng.normal(0, 0.08), float(rng.random() < 0.5)) for _ in chosen]
        return np.array(
            [(s, *p, *t) for s, p, t in zip(chosen, places, turns, strict=True)], np.float32
        )

    def _side_by_side(self, rng: Generator, count: int, size: str | None) -> list[tuple]:
        low, high = {1: (0.45, 0.88), 2: (0.38, 0.52), 3: (0.27, 0.36)}[count]
        low, high = {"small": (0.22, 0.32), "big": (0.86, 0.94)}.get(size or "", (low, high))
        places = []
        for x in _columns(rng, count):
            scale = rng.uniform(low, high)
            lowest = 0.94 - scale
            y = rng.uniform(min(0.05, lowest), lowest)
            places.append((float(np.clip(x, scale - 1.05, 1.05 - scale)), y, scale))
        return places

    def _stacked(self, rng: Generator, chosen: list[int], first_above: bool) -> list[tuple]:
        """One above the other, touching; the lower one stands near the bottom."""
        upper, lower = chosen if first_above else chosen[::-1]
        top, base = self.sprites[upper], self.sprites[lower]
        scales = np.array([rng.uniform(0.36, 0.5), rng.uniform(0.42, 0.56)])
        height = scales @ (top.bottom - top.top, base.bottom - base.top)
        scales *= min(1.0, 1.82 / height)
        x, y = rng.normal(0, 0.15), 0.93 - base.bottom * scales[1]
        above = y + base.top * scales[1] + 0.05 - top.bottom * scales[0]
        places = [(x + rng.normal(0, 0.05), above, scales[0]), (x, y, scales[1])]
        return places if first_above else places[::-1]

    def _dresses(self, rng: Generator, chosen: list[int], worn: bool | None) -> bool:
        share = {1: 0.3, 2: 0.15, 3: 0.0}[len(chosen)]
        wanted = rng.random() < share if worn is None else worn
        return wanted and self._can_wear(chosen[0])

    def _dress(self, rng: Generator, layers: np.ndarray, alone: bool) -> str:
        """Put an accessory on the first subject's head; returns its noun."""
        noun = sorted(self.accessories)[int(rng.random() * len(self.accessories))]
        item = _pick(rng, self.accessories[noun])
        body = self.sprites[int(layers[0, 0])]
        if alone:  # room for what is worn
            scale = float(min(layers[0, 3], rng.uniform(0.45, 0.62)))
            layers[0, 2:5] = 0.92 - scale, scale, 0.0
        _, x, y, scale, _, mirror, _ = layers[0]
        size = float(np.clip(0.62 * body.half_width, 0.34, 0.6)) * scale * 1.15
        head = (-body.head if mirror > 0 else body.head) * scale
        above = y + body.top * scale + DROP[noun] * size
        layers[SUBJECTS] = item, x + head, above, size, rng.normal(0, 0.05), mirror, -1
        return noun

    def _style(self, rng: Generator) -> int:
        return int(rng.random() * len(DRAWING_STYLES)) if rng.random() < 0.2 else -1

    def _art(self, rng: Generator, chosen: list[int]) -> str | None:
        """The art set to name. What exists only as renders is sometimes called a photo."""
        styles = {self.sprites[s].style for s in chosen}
        if len(styles) > 1:
            return None
        nouns = {self.sprites[s].noun for s in chosen}
        if styles == {"3d render"} and not nouns & self.photographed and rng.random() < 0.35:
            return "photo"
        return styles.pop()

    def _background(self, rng: Generator, scene: int, style: int) -> np.ndarray:
        variant = scene * self.variants + int(rng.random() * self.variants)
        margin = SIZE - IMAGE_SIZE
        shadow = float(self.scenes[scene] in GROUNDED or rng.random() < 0.5)
        crop = (rng.random(2) * (margin + 1)).astype(int)
        light = rng.uniform(0.88, 1.1)
        return np.array([variant, *crop, rng.random() < 0.5, light, shadow, style], np.float32)


def _by_noun(sprites: list[Sprite], kind: str) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, sprite in enumerate(sprites):
        if sprite.kind == kind and sprite.held_out is None:
            table.setdefault(sprite.noun, []).append(index)
    return table


def _held_out(sprites: list[Sprite]) -> list[list[int]]:
    table: dict[str, list[int]] = {}
    for index, sprite in enumerate(sprites):
        if sprite.held_out:
            table.setdefault(sprite.held_out, []).append(index)
    return [table[name] for name in sorted(table)]


def _pick(rng: Generator, options: list[int]) -> int:
    return options[int(rng.random() * len(options))]


def _columns(rng: Generator, count: int) -> list[float]:
    if count == 1:
        return [rng.normal(0, 0.22)]
    if count == 2:
        gap = rng.uniform(0.42, 0.5)
        return [-gap, gap]
    gap = rng.uniform(0.6, 0.68)
    return [-gap, rng.normal(0, 0.03), gap]
