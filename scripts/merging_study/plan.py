"""What is drawn: concepts, the threes that are merged, conditions and prompts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

CLASS_WORD, SINGLE, ROUTED = "class_word", "single", "routed"
SAME, MIXED, ALL = "merged3_same_category", "merged3_mixed", "merged_all"
CONDITIONS = (CLASS_WORD, SINGLE, ROUTED, SAME, MIXED, ALL)
UNRELATED = "unrelated"
BASE = "base"

UNRELATED_PROMPTS = (  # none has a concept's token or class noun
    "a photo of a lion on the beach",
    "a photo of an elephant in the snow",
    "a photo of a robot in the forest",
    "a photo of a rocket in space",
    "a photo of a teapot in a kitchen",
    "a photo of a guitar on a green background",
    "a photo of a penguin next to a banana in a room",
    "a photo of an owl next to a tree in a meadow",
    "a drawing of a camel in the desert",
    "a watercolour painting of a wolf in the mountains at sunset",
    "a photo of a bicycle on the street",
    "a photo of a turtle under water",
    "a photo of a tractor on a farm",
    "a photo of an umbrella in the rain",
    "a photo of a violin on a stage",
    "a photo of a zebra in a meadow",
    "a drawing of a dragon in front of a castle",
    "a photo of a strawberry in a kitchen",
    "a photo of a taxi in a city at night",
    "a photo of an astronaut in space",
)


@dataclass(frozen=True)
class Three:
    """Three concepts that are merged; `kind` is SAME or MIXED."""

    kind: str
    concepts: tuple[str, str, str]

    @property
    def label(self) -> str:
        return "+".join(self.concepts)


def threes(categories: Mapping[str, str], seed: int) -> list[Three]:
    """Threes that hold every concept at least once within its category, at least once mixed.

    The concepts of each category are shuffled and laid in a circle, which is cut into threes; the
    last three takes its missing ones from the start. For mixed threes the circles are laid into
    each other, one concept of each category in turn.

    Args:
        categories: concept → category; at least three concepts of each of two or more categories,
            and about as many of each.
    """
    rng = random.Random(seed)
    circles = []
    for category in sorted(set(categories.values())):
        circle = sorted(name for name in categories if categories[name] == category)
        rng.shuffle(circle)
        circles.append(circle)
    if len(circles) < 2 or min(map(len, circles)) < 3:
        raise SystemExit("merging is studied with three concepts or more of each of two categories")
    same = [Three(SAME, part) for circle in circles for part in _cut(circle)]
    woven = [name for turn in zip_longest(*circles) for name in turn if name]
    mixed = [Three(MIXED, part) for part in _cut(woven)]
    if any(len({categories[name] for name in three.concepts}) == 1 for three in mixed):
        raise SystemExit("a category has too many concepts for threes of mixed categories")
    return [*same, *mixed]


def _cut(circle: Sequence[str]) -> list[tuple[str, str, str]]:
    around = [*circle, *circle[:2]]
    return [(around[k], around[k + 1], around[k + 2]) for k in range(0, len(circle), 3)]


def part_of(names: Sequence[str], part: int, parts: int) -> list[str]:
    """What the process `part` of 1 … `parts` draws."""
    if not 1 <= part <= parts:
        raise SystemExit(f"--part must be 1 to {parts}, got {part}")
    return list(names[part - 1 :: parts])


def numbered(prompts: Sequence[str], words: str, num: int) -> list[str]:
    """`num` times each prompt about these words, as `sbora evaluate` draws them."""
    return list(chain.from_iterable([prompt.format(words)] * num for prompt in prompts))
