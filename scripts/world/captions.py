"""Captions of the embedded world: one grammar with paraphrases.

"a 3d render of a lion wearing a crown on the beach", "a drawing of a dog next to a banana
in a meadow". The style word follows the art set that a sprite comes from.
"""

from collections.abc import Sequence

from numpy.random import Generator

STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photograph of", "a picture of"),
    "3d render": ("a 3d render of", "a 3d picture of"),
    "drawing": ("a drawing of", "an illustration of"),
    "cartoon": ("a cartoon of", "a cartoon picture of"),
    "flat icon": ("a flat icon of", "an icon of"),
}

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach by the sea"),
    "snow": ("in the snow", "on the snow", "in a snowy field"),
    "forest": ("in the forest", "in a forest", "among trees in the woods"),
    "city_at_night": ("in a city at night", "in the city at night", "with a night city behind"),
    "desert": ("in the desert", "in a desert", "among sand dunes"),
    "under_water": ("under water", "under the sea", "at the bottom of the ocean"),
    "meadow": ("in a meadow", "on a green meadow", "in a field of flowers"),
    "space": ("in space", "in outer space", "among the stars"),
    "mountains_at_sunset": (
        "in the mountains at sunset", "with mountains at sunset", "in front of mountains at sunset",
    ),
    "room": ("in a room", "in the living room", "inside a house"),
    "kitchen": ("in a kitchen", "in the kitchen", "on a kitchen counter"),
    "street": ("on the street", "on a city street", "on a road in town"),
    "library": ("in a library", "in the library", "in front of a bookshelf"),
    "farm": ("on a farm", "on the farm", "in front of a red barn"),
    "volcano": ("near a volcano", "in front of a volcano", "with an erupting volcano behind"),
    "rain": ("in the rain", "on a rainy day", "in heavy rain"),
    "castle": ("in front of a castle", "at the castle", "near a castle"),
    "stage": ("on a stage", "on the stage", "in front of a red curtain"),
}  # fmt: skip

RELATIONS = ("next to", "beside", "and")
_SINGULAR_IN_S = ("ss", "us")  # "a glass", "a bus"


def with_article(noun: str) -> str:
    """ "cat" → "a cat", "apple" → "an apple", "sunglasses" → "sunglasses"."""
    if noun.endswith("s") and not noun.endswith(_SINGULAR_IN_S):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def place_phrase(scene: str, rng: Generator) -> str:
    """The words for a scene or for a flat backdrop; the plainest form half of the time."""
    if scene not in PLACES:
        backdrop = f"{with_article(scene)} background"
        return f"on {backdrop}" if rng.random() < 0.7 else f"with {backdrop}"
    forms = PLACES[scene]
    return forms[0] if rng.random() < 0.5 else forms[rng.integers(len(forms))]


def caption(
    nouns: Sequence[str], accessory: str | None, style: str | None, scene: str, rng: Generator
) -> str:
    """The caption of a scene with one or two subjects, from left to right."""
    subject = with_article(nouns[0])
    if accessory:
        subject += f" wearing {with_article(accessory)}"
    if len(nouns) > 1:
        subject += f" {RELATIONS[rng.integers(len(RELATIONS))]} {with_article(nouns[1])}"
    words = f"{subject} {place_phrase(scene, rng)}"
    if style is None or rng.random() < 0.15:
        return words
    forms = STYLES[style]
    opening = forms[0] if rng.random() < 0.6 else forms[rng.integers(len(forms))]
    return f"{opening} {words}"
