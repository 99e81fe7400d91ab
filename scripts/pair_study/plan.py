"""Which pictures the study has: every pair of concepts, four pictures each, in four conditions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.regions import Box

CONDITIONS = ("sbora", "sbora-regions", "lora", "lora-regions")
METHODS = ("sbora", "lora")
PROMPTS = (
    "a photo of {} next to {} in the forest",
    "a photo of {} next to {} on the beach",
)
LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)

Pair = tuple[str, str]


@dataclass(frozen=True)
class Planned:
    """One picture.

    Attributes:
        order: the names as the prompt has them; the first belongs on the left.
    """

    order: Pair
    prompt: str
    seed: int

    def record(self) -> dict[str, Any]:
        return asdict(self)


def all_pairs(names: Sequence[str]) -> list[Pair]:
    """Every two names, sorted."""
    return list(combinations(sorted(names), 2))


def pictures_of(pairs: Sequence[Pair], pair: Pair, tokens: dict[str, str]) -> list[Planned]:
    """Two prompts with two seeds each; the second seed turns the names around.

    Seeds are the same in all conditions and different for every pair.

    Args:
        pairs: all of the study's, of which the pair is one.
        tokens: name → placeholder token.
    """
    first_seed = 2 * pairs.index(pair)
    return [
        Planned(order, prompt.format(*(tokens[name] for name in order)), first_seed + turned)
        for prompt in PROMPTS
        for turned, order in enumerate((pair, pair[::-1]))
    ]


def part_of(items: Sequence[Any], part: int, parts: int) -> list[Any]:
    """Part 0 … parts − 1 of a list, neighbours together, sizes within one of each other."""
    assert 0 <= part < parts, (part, parts)
    bounds = [len(items) * k // parts for k in (part, part + 1)]
    return list(items[bounds[0] : bounds[1]])


def tokens_of(subjects: Sequence[Subject]) -> dict[str, str]:
    return {subject.settings.name: subject.settings.token for subject in subjects}
