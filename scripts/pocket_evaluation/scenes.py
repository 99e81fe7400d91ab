"""Cases to judge: prompts that no training used, each with the real picture of its content."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from world.backgrounds import SCENES
from world.captions import STYLES, place_phrase
from world.compose import Composer
from world.drawing_styles import DRAWING_STYLES
from world.plans import SUBJECTS, ScenePlan, ScenePlanner, reserved
from world.sprites import COLOURS, Sprite, SpriteBank

from pocket_evaluation.questions import Prompt

VARIANTS = 12  # drawings of each background
COMPOSED_AT_ONCE = 64
PLAIN_ART = ("photo", "3d render")


@dataclass(frozen=True)
class Case:
    """A prompt, the plan that it words, and its subjects' sprites."""

    prompt: Prompt
    plan: ScenePlan
    sprites: tuple[Sprite, ...]


class Subset:
    """A planner over some of a bank's sprites; its plans hold the bank's own indices."""

    def __init__(self, bank: SpriteBank, rows: Sequence[int], by_class: bool = False):
        """Args: `by_class`, whether held-out subjects go by their class noun alone."""
        chosen = [bank.sprites[row] for row in rows]
        if by_class:
            chosen = [replace(sprite, held_out=None) for sprite in chosen]
        self.rows = np.array(rows, np.float32)
        self.planner = ScenePlanner(chosen, VARIANTS)

    def plan(self, rng: Generator, **options: Any) -> ScenePlan:
        """As `ScenePlanner.plan`."""
        plan = self.planner.plan(rng, **options)
        layers = plan.layers.copy()
        there = layers[:, 0] >= 0
        layers[there, 0] = self.rows[layers[there, 0].astype(int)]
        return replace(plan, layers=layers)


class World:
    """Sprites of all subjects with backgrounds of a new seed, and planners over parts of them."""

    def __init__(self, folder: Path, seed: int, device: torch.device):
        self.bank = SpriteBank.load(folder, held_out=True)
        planner = ScenePlanner(self.bank.sprites, VARIANTS)
        self.nouns = planner.nouns
        self.composer = Composer(self.bank, planner, seed, device)
        self.sprites_of = {noun: len(rows) for noun, rows in planner.subjects.items()}

    def seen(self) -> Subset:
        return Subset(self.bank, self._rows(lambda s: s.held_out is None))

    def held_out(self) -> Subset:
        return Subset(self.bank, self._rows(lambda s: s.held_out is not None), by_class=True)

    def rare(self, other_art: bool = False) -> Subset:
        """Subjects that are kept out of some scenes in training, in their plainest art set.

        Args:
            other_art: in the other art sets instead.
        """
        plainest = self._plainest()

        def wanted(sprite: Sprite) -> bool:
            if sprite.held_out is not None or not rare_scenes(sprite.noun):
                return False
            if other_art:
                return sprite.style not in PLAIN_ART
            return sprite.style == plainest[sprite.noun]

        return Subset(self.bank, self._rows(wanted))

    def _rows(self, wanted: Callable[[Sprite], bool]) -> list[int]:
        """Wanted subjects, and all accessories."""
        return [
            row
            for row, sprite in enumerate(self.bank.sprites)
            if sprite.kind == "accessory" or wanted(sprite)
        ]

    def _plainest(self) -> dict[str, str]:
        """Noun → the first of the art sets that has it: a photo where there is one."""
        order = list(STYLES)
        found: dict[str, str] = {}
        for sprite in self.bank.sprites:
            if sprite.kind == "subject" and sprite.held_out is None:
                known = found.get(sprite.noun, sprite.style)
                found[sprite.noun] = min(known, sprite.style, key=order.index)
        return found

    def compose(self, plans: Sequence[ScenePlan]) -> list[Image.Image]:
        """The real pictures of plans."""
        pictures: list[Image.Image] = []
        for start in range(0, len(plans), COMPOSED_AT_ONCE):
            part = plans[start : start + COMPOSED_AT_ONCE]
            layers = torch.from_numpy(np.stack([plan.layers for plan in part]))
            background = torch.from_numpy(np.stack([plan.background for plan in part]))
            pictures += to_pictures(self.composer.compose(layers, background))
        return pictures


def generator(seed: int, name: str) -> Generator:
    """An own stream for every set, so that none depends on the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [−1, 1] → pictures."""
    levels = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def rare_scenes(noun: str) -> list[str]:
    """Scenes that training never puts a subject into; some nouns have none."""
    return [scene for scene in SCENES if reserved(noun, scene)]


@dataclass(frozen=True)
class CaseSet:
    """How to draw cases of one kind, what to ask, and what must be reached.

    Attributes:
        most: cases at most, whatever number is asked for.
        vary: a part to set evenly, case by case: "drawn" or "colour".
    """

    name: str
    asks: tuple[str, ...]
    count: int = 1
    worn: bool = False
    sized: bool = False
    relations: tuple[str, ...] = ("next to",)
    vary: str | None = None
    other_art: bool = False
    thresholds: tuple[tuple[str, float], ...] = ()
    most: int | None = None

    def cases(self, world: World, rng: Generator, number: int) -> list[Case]:
        subset = world.rare(self.other_art)
        number = min(number, self.most or number)
        return [self._case(world, subset, rng, k) for k in range(number)]

    def _case(self, world: World, subset: Subset, rng: Generator, number: int) -> Case:
        plan = self._plan(subset, rng)
        sprites = tuple(
            world.bank.sprites[int(row)] for row in plan.layers[:SUBJECTS, 0] if row >= 0
        )
        arts = {sprite.style for sprite in sprites}
        prompt = Prompt(
            art=arts.pop() if len(arts) == 1 else None,
            nouns=tuple(sprite.noun for sprite in sprites),
            scene=plan.scene,
            place=place_phrase(plan.scene, rng),
            relation=plan.relation,
            accessory=plan.mentions[0].accessory,
            size=plan.mentions[0].size,
        )
        return self._varied(Case(prompt, plan, sprites), number)

    def _plan(self, subset: Subset, rng: Generator) -> ScenePlan:
        while True:
            plan = subset.plan(rng, count=self.count, worn=self.worn, rare=True, drawn=False)
            plain = (plan.layers[:SUBJECTS, 6] < 0).all()
            sized = plan.mentions[0].size is not None
            if plain and sized == self.sized and plan.relation in self.relations:
                return plan

    def _varied(self, case: Case, number: int) -> Case:
        layers, background = case.plan.layers.copy(), case.plan.background.copy()
        if self.vary == "drawn":
            background[6] = number % (len(DRAWING_STYLES) + 1) - 1
            value = None if background[6] < 0 else DRAWING_STYLES[int(background[6])]
        elif self.vary == "colour":
            layers[0, 6] = number % len(COLOURS)
            value = COLOURS[number % len(COLOURS)]
        else:
            return case
        plan = replace(case.plan, layers=layers, background=background)
        return replace(case, prompt=replace(case.prompt, **{self.vary: value}), plan=plan)


SETS = (
    CaseSet(
        "one_subject",
        ("subject", "scene", "scene_or_flat_colour"),
        thresholds=(("subject", 0.80), ("scene", 0.95)),
    ),
    CaseSet(
        "accessory", ("accessory", "subject", "scene"), worn=True, thresholds=(("accessory", 0.70),)
    ),
    CaseSet(
        "two_subjects", ("subject", "second_subject", "scene"), count=2,
        thresholds=(("both_subjects", 0.65),),
    ),
    CaseSet(
        "relations", ("relation", "subject", "second_subject"), count=2,
        relations=("on top of", "under"), most=100,
    ),
    CaseSet("drawing_styles", ("drawing_style", "subject", "scene"), vary="drawn", most=100),
    CaseSet("colours", ("colour", "subject"), vary="colour", most=100),
    CaseSet("sizes", ("size", "subject"), sized=True, most=100),
    CaseSet("other_art_sets", ("subject", "scene"), other_art=True, most=100),
)  # fmt: skip
