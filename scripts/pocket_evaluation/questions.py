"""What the judge is asked about a picture: its prompt against the same one with a part exchanged.

Everything here is text; the judge comes in at `answers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from numpy.random import Generator
from torch import Tensor
from world.backgrounds import FLAT_COLOURS, SCENES
from world.captions import (
    ANY_STYLE,
    DRAWN,
    RELATIONS,
    SIZES,
    STYLES,
    SYNONYMS,
    place_phrase,
    with_article,
)
from world.drawing_styles import DRAWING_STYLES
from world.sprites import COLOURS

from sbora_diffusion.evaluation.metrics import classify

ACCESSORIES = ("crown", "glasses", "hat", "headphones", "scarf")
SUBJECT_CHOICES = 50
PLAIN = "plain"  # the answer for pictures in no drawing style
ALIKE = (  # nouns that fit the same picture; none is a wrong answer where another is meant
    {"boat", "ship", "sailboat", "canoe"},
    {"boot", "shoe", "sneaker", "flat shoe", "high heel shoe", "ballet shoes", "slippers"},
    {"deciduous tree", "evergreen tree", "leafless tree", "christmas tree", "palm tree"},
    {"blossom", "cherry blossom", "hibiscus", "lily", "lotus", "orchid", "hyacinth", "bouquet"},
    {"bird", "dove", "eagle", "chick", "chicken", "rooster", "duck", "goose", "swan", "dodo"},
    {"mouse", "rat", "hamster"},
    {"cow", "ox", "water buffalo", "bison"},
    {"sheep", "ram", "goat"},
    {"beetle", "bug", "ant"},
    {"soccer ball", "football", "rugby ball"},
    {"hat", "cap"},
    {"coffee cup", "tea cup"},
    {"bus", "minibus"},
    {"car", "taxi", "police car"},
    {"truck", "pickup truck", "fire truck"},
    {"train", "train car", "tram", "monorail"},
    {"motorcycle", "scooter", "kick scooter"},
    {"house", "hut"},
    {"purse", "handbag"},
    {"jar", "vase", "urn"},
    {"soup", "stew", "noodle soup"},
    {"herb", "leafy green", "seedling", "potted plant"},
    {"shamrock", "four leaf clover"},
    {"glasses", "sunglasses"},
    {"shirt", "blouse"},
    {"knife", "dagger"},
    {"notebook", "book"},
    {"camera", "video camera", "movie camera"},
    {"couch", "armchair"},
    {"wardrobe", "filing cabinet", "chest of drawers", "bedside table"},
    {"bear", "panda"},
    {"gear", "wheel"},
    {"superhero", "supervillain"},
    {"man", "old man", "judge", "teacher", "student", "scientist", "artist", "singer", "mechanic"},
    {"woman", "old woman", "girl"},
    {"desk", "table"},
    {"lantern", "oil lamp"},
    {"ice cream", "shaved ice"},
)
VISIBLE = {  # nouns that a scene shows by itself: no wrong answers about a picture of it
    "beach": ("sun",),
    "snow": ("evergreen tree", "snowflake"),
    "forest": ("evergreen tree", "bush"),
    "city_at_night": ("office building", "moon"),
    "desert": ("cactus", "sun"),
    "meadow": ("blossom", "cloud", "sunflower"),
    "space": ("planet", "star", "comet", "moon"),
    "mountains_at_sunset": ("sun",),
    "kitchen": ("jar", "bottle"),
    "street": ("office building", "house"),
    "library": ("book", "books", "bookcase"),
    "farm": ("house", "cloud"),
    "volcano": ("volcano", "fire"),
    "rain": ("cloud", "storm cloud", "droplet"),
    "castle": ("castle", "cloud"),
}


@dataclass(frozen=True)
class Prompt:
    """The parts of a plainly worded prompt.

    Attributes:
        art: art set to name (a key of `STYLES`), None for "a picture of".
        place: the words for `scene`.
        drawn: drawing style to ask for (a key of `DRAWN`).
    """

    art: str | None
    nouns: tuple[str, ...]
    scene: str
    place: str
    relation: str = "next to"
    accessory: str | None = None
    colour: str | None = None
    size: str | None = None
    drawn: str | None = None

    @property
    def opening(self) -> str:
        if self.drawn:
            return DRAWN[self.drawn][0]
        return STYLES[self.art][0] if self.art else ANY_STYLE[0]

    def text(self) -> str:
        """ "a photo of a lion wearing a hat on the beach"."""
        size = SIZES[self.size][0] if self.size else None
        first = " ".join(word for word in (size, self.colour, self.nouns[0]) if word)
        words = with_article(first)
        if self.accessory:
            words += f" wearing {with_article(self.accessory)}"
        for noun in self.nouns[1:]:
            words += f" {RELATIONS[self.relation][0]} {with_article(noun)}"
        return f"{self.opening} {words} {self.place}"


@dataclass(frozen=True)
class Question:
    """Texts to choose from, what choosing each one says; the last one is the truth."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def truth(self) -> str:
        return self.labels[-1]


def alike(noun: str, other: str) -> bool:
    """Whether both may name one picture: the same, synonyms, a kind of it, or one within it."""
    names = {noun, SYNONYMS.get(noun, noun)}
    others = {other, SYNONYMS.get(other, other)}
    if names & others or any(names & group and others & group for group in ALIKE):
        return True
    return any(_within(a, b) or _within(b, a) for a in names for b in others)


@cache
def _alike_nouns(noun: str, nouns: tuple[str, ...]) -> frozenset[str]:
    return frozenset(other for other in nouns if alike(noun, other))


def _within(short: str, long: str) -> bool:
    return f" {short} " in f" {long} "


def _question(prompt: Prompt, part: str, options: dict[str, Prompt], truth: str) -> Question:
    """The truth last, worded as the prompt is."""
    wrong = {label: option for label, option in options.items() if label != truth}
    texts = (*(option.text() for option in wrong.values()), prompt.text())
    assert len(set(texts)) == len(texts), f"two options for the {part} read the same"
    return Question(texts, (*wrong, truth))


def _subject(prompt: Prompt, which: int, nouns: Sequence[str], rng: Generator) -> Question:
    there = {*prompt.nouns, prompt.accessory or prompt.nouns[0], *VISIBLE.get(prompt.scene, ())}
    excluded = frozenset[str]().union(*(_alike_nouns(noun, tuple(nouns)) for noun in there))
    options = [noun for noun in nouns if noun not in excluded]
    chosen = rng.permutation(options)[: SUBJECT_CHOICES - 1].tolist()
    exchanged = {
        noun: replace(prompt, nouns=(*prompt.nouns[:which], noun, *prompt.nouns[which + 1 :]))
        for noun in chosen
    }
    return _question(prompt, "subject", exchanged, prompt.nouns[which])


def subject(prompt: Prompt, nouns: Sequence[str], rng: Generator) -> Question:
    """Which subject, the first one, of 50."""
    return _subject(prompt, 0, nouns, rng)


def second_subject(prompt: Prompt, nouns: Sequence[str], rng: Generator) -> Question:
    """Which second subject, of 50."""
    return _subject(prompt, 1, nouns, rng)


def scene(prompt: Prompt, _nouns: Sequence[str], rng: Generator) -> Question:
    """Which scene, of all."""
    return _places(prompt, tuple(SCENES), rng)


def backdrop(prompt: Prompt, _nouns: Sequence[str], rng: Generator) -> Question:
    """Which of all scenes and flat colours."""
    return _places(prompt, (*SCENES, *FLAT_COLOURS), rng)


def _places(prompt: Prompt, scenes: Sequence[str], rng: Generator) -> Question:
    options = {s: replace(prompt, scene=s, place=place_phrase(s, rng)) for s in scenes}
    return _question(prompt, "scene", options, prompt.scene)


def _among(part: str, options: Sequence[str]) -> Callable[..., Question]:
    """A question whose options are the values of one part of the prompt."""

    def ask(prompt: Prompt, _nouns: Sequence[str], _rng: Generator) -> Question:
        exchanged = {option: replace(prompt, **{part: option}) for option in options}
        return _question(prompt, part, exchanged, getattr(prompt, part))

    return ask


def drawing_style(prompt: Prompt, _nouns: Sequence[str], _rng: Generator) -> Question:
    """Which drawing style, or none."""
    options = {style: replace(prompt, drawn=style) for style in DRAWING_STYLES}
    options[PLAIN] = replace(prompt, drawn=None)
    return _question(prompt, "drawing style", options, prompt.drawn or PLAIN)


QUESTIONS: dict[str, Callable[[Prompt, Sequence[str], Generator], Question]] = {
    "subject": subject,
    "second_subject": second_subject,
    "scene": scene,
    "scene_or_flat_colour": backdrop,
    "accessory": _among("accessory", ACCESSORIES),
    "relation": _among("relation", tuple(RELATIONS)),
    "drawing_style": drawing_style,
    "colour": _among("colour", COLOURS),
    "size": _among("size", tuple(SIZES)),
}


def answers(
    pictures: Tensor, questions: Sequence[Question], texts: Callable[[list[str]], Tensor]
) -> list[str]:
    """What each picture's question is answered with.

    Args:
        pictures: (N, D), features.
        texts: texts → their features (K, D).
    """
    assert len(pictures) == len(questions), (len(pictures), len(questions))
    unique = list(dict.fromkeys(text for question in questions for text in question.texts))
    row = {text: k for k, text in enumerate(unique)}
    features = texts(unique)
    found = []
    for picture, question in zip(pictures, questions, strict=True):
        options = features[torch.tensor([row[text] for text in question.texts])]
        found.append(question.labels[int(classify(picture[None], options))])
    return found
