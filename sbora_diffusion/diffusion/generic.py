"""Prompts about nothing in particular: what any model draws, and no concept is called in."""

import random

from sbora_diffusion.diffusion.prompts import with_article

MANNERS = (
    "a photo of", "a picture of", "a close view of", "an image of", "a sketch of",
    "an oil painting of",
)  # fmt: skip
NOUNS = (
    "cat", "dog", "horse", "bird", "fish", "bear", "rabbit", "elephant", "man", "woman", "car",
    "train", "bicycle", "boat", "chair", "sofa", "lamp", "clock", "house", "tree", "cake", "apple",
    "banana", "vase", "teapot", "doll", "toy", "robot", "hat", "jacket", "dress", "helmet",
    "suitcase", "watch", "guitar",
)  # fmt: skip
PLACES = (
    "", "in a city at night", "under water", "on a street", "in a library", "on a farm",
    "near a volcano", "in the rain", "in front of a castle", "on a stage", "in a garden",
)  # fmt: skip
"""None of those in which `sbora evaluate` looks at a concept."""
BESIDE = 0.3
"""How often a second thing stands beside the first."""


def generic_prompts(count: int, seed: int) -> list[str]:
    """Prompts of nouns, places and manners; the same for the same seed on every machine."""
    rng = random.Random(seed)
    return [_prompt(rng) for _ in range(count)]


def _prompt(rng: random.Random) -> str:
    parts = [rng.choice(MANNERS), with_article(rng.choice(NOUNS))]
    if rng.random() < BESIDE:
        parts.append(f"next to {with_article(rng.choice(NOUNS))}")
    return " ".join([*parts, rng.choice(PLACES)]).strip()
