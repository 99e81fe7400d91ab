"""Captions of the embedded world: one grammar with paraphrases.

"a 3d render of a lion wearing a crown on the beach", "a small red car next to a dog in a meadow,
pixel art". The opening follows the art set that a sprite comes from, or the drawing style in
which the whole picture was redrawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photograph of", "a snapshot of", "a close-up photo of", "photo of"),
    "3d render": ("a 3d render of", "a 3d picture of", "a 3d rendering of", "3d render of"),
    "drawing": ("a drawing of", "an illustration of", "a coloured drawing of"),
    "cartoon": ("a cartoon of", "a cartoon picture of", "a cartoon drawing of"),
    "flat icon": ("a flat icon of", "an icon of", "a simple icon of"),
}
DRAWN: dict[str, tuple[str, ...]] = {  # openings that name a drawing style, then words at the end
    "pixel art": ("pixel art of", "a pixel art picture of", "a pixelated picture of"),
    "watercolour": ("a watercolour painting of", "a watercolor of", "a watercolour of"),
    "pencil sketch": ("a pencil sketch of", "a sketch of", "a pencil drawing of"),
    "oil painting": ("an oil painting of", "a painting of", "an oil painting showing"),
    "black and white photo": ("a black and white photo of", "a black and white picture of"),
    "sepia photo": ("a sepia photo of", "an old photo of", "a vintage photo of"),
    "mosaic": ("a mosaic of", "a mosaic picture of", "a tiled mosaic of"),
    "neon": ("a neon picture of", "a neon sign of", "a glowing neon drawing of"),
    "comic": ("a comic of", "a comic book picture of", "a comic panel of"),
}
ANY_STYLE = ("a picture of", "an image of", "a view of", "a picture showing", "there is")
ENDINGS = {
    "pixel art": ("pixel art", "as pixel art", "in pixel art style"),
    "watercolour": ("watercolour", "in watercolour style", "painted in watercolour"),
    "pencil sketch": ("pencil sketch", "as a pencil sketch", "drawn in pencil"),
    "oil painting": ("oil painting", "as an oil painting", "painted in oil"),
    "black and white photo": ("black and white", "in black and white"),
    "sepia photo": ("sepia", "in sepia", "vintage style"),
    "mosaic": ("mosaic", "as a mosaic", "made of tiles"),
    "neon": ("neon", "in neon lights", "neon style"),
    "comic": ("comic", "comic style", "as a comic"),
}

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach by the sea", "at the seaside"),
    "snow": ("in the snow", "on the snow", "in a snowy field", "on a winter day in the snow"),
    "forest": ("in the forest", "in a forest", "among trees in the woods", "in the woods"),
    "city_at_night": (
        "in a city at night", "in the city at night", "with a night city behind",
        "in front of a city skyline at night",
    ),
    "desert": ("in the desert", "in a desert", "among sand dunes", "on desert sand"),
    "under_water": (
        "under water", "under the sea", "at the bottom of the ocean", "underwater in the ocean",
    ),
    "meadow": (
        "in a meadow", "on a green meadow", "in a field of flowers", "on the grass in a meadow",
    ),
    "space": ("in space", "in outer space", "among the stars", "floating in space"),
    "mountains_at_sunset": (
        "in the mountains at sunset", "with mountains at sunset", "in front of mountains at sunset",
        "in the mountains",
    ),
    "room": ("in a room", "in the living room", "inside a house", "in a living room"),
    "kitchen": ("in a kitchen", "in the kitchen", "on a kitchen counter"),
    "street": ("on the street", "on a city street", "on a road in town", "on a street"),
    "library": ("in a library", "in the library", "in front of a bookshelf", "among books"),
    "farm": ("on a farm", "on the farm", "in front of a red barn", "next to a barn"),
    "volcano": ("near a volcano", "in front of a volcano", "with an erupting volcano behind"),
    "rain": ("in the rain", "on a rainy day", "in heavy rain", "in rainy weather"),
    "castle": ("in front of a castle", "at the castle", "near a castle", "with a castle behind"),
    "stage": ("on a stage", "on the stage", "in front of a red curtain", "on a theatre stage"),
    "studio": ("in a studio", "in a photo studio", "in front of a studio backdrop"),
}  # fmt: skip

RELATIONS: dict[str, tuple[str, ...]] = {  # how the first subject stands to the second
    "next to": ("next to", "next to", "beside", "and", "with", "near", "to the left of"),
    "on top of": ("on top of", "on", "standing on", "sitting on top of"),
    "under": ("under", "below", "underneath", "beneath"),
}
SYNONYMS = {
    "couch": "sofa", "airplane": "plane", "bicycle": "bike", "motorcycle": "motorbike",
    "rabbit": "bunny", "television": "tv", "refrigerator": "fridge", "coffee cup": "mug",
    "hamburger": "burger", "telephone": "phone", "car": "automobile", "potted plant": "plant",
    "hut": "cabin", "trash can": "bin", "backpack": "rucksack", "sneaker": "running shoe",
    "gift": "present", "taxi": "cab", "ship": "boat", "teddy bear": "plush bear",
    "chick": "baby chicken", "crocodile": "alligator", "hippopotamus": "hippo", "dove": "pigeon",
    "rhinoceros": "rhino", "flying saucer": "ufo", "desktop computer": "computer",
    "laptop": "notebook computer", "doughnut": "donut", "wardrobe": "closet", "rug": "carpet",
    "spectacles": "glasses", "evergreen tree": "pine tree", "deciduous tree": "tree",
    "police officer": "policeman", "cook": "chef", "bookcase": "bookshelf", "panda": "panda bear",
}  # fmt: skip
SIZES = {"small": ("small", "tiny", "little"), "big": ("big", "large", "huge", "giant")}
POSES = ("standing", "sitting", "placed", "shown", "seen")
PRAISE = ("high quality", "detailed", "highly detailed", "professional", "beautiful", "hd", "4k")
FILLERS = ("my", "nice", "cute", "lovely", "famous", "old", "new", "funny", "single", "typical")
_SINGULAR_IN_S = ("ss", "us")  # "a glass", "a bus"


@dataclass(frozen=True)
class Mention:
    """One subject as a caption names it, with what distinguishes it.

    The noun of a held-out subject may carry its name in front: "plushbear teddy bear".
    """

    noun: str
    size: str | None = None
    colour: str | None = None
    accessory: str | None = None


def with_article(noun: str) -> str:
    """ "cat" → "a cat", "apple" → "an apple", "sunglasses" → "sunglasses"."""
    if noun.endswith("s") and not noun.endswith(_SINGULAR_IN_S):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _plain_or(rng: Generator, options: Sequence[str], plain: float) -> str:
    """The first, plainest form with probability `plain`, else any."""
    return options[0] if rng.random() < plain else _pick(rng, options)


def place_phrase(scene: str, rng: Generator) -> str:
    """The words for a scene or for a flat backdrop; the plainest form half of the time."""
    if scene in PLACES:
        return _plain_or(rng, PLACES[scene], 0.45)
    backdrop = f"{with_article(scene)} background"
    return f"on {backdrop}" if rng.random() < 0.7 else f"with {backdrop}"


def mention_phrase(mention: Mention, rng: Generator) -> str:
    """ "a tiny red car", "the dog wearing a hat"."""
    noun = mention.noun
    if rng.random() < 0.15:
        noun = SYNONYMS.get(noun, noun)
    size = _pick(rng, SIZES[mention.size]) if mention.size else None
    filler = _pick(rng, FILLERS) if rng.random() < 0.04 else None
    words = " ".join(word for word in (size, filler, mention.colour, noun) if word)
    roll = rng.random()
    phrase = with_article(words) if roll > 0.1 else words if roll > 0.05 else f"the {words}"
    if mention.accessory:
        verb = "wearing" if rng.random() < 0.8 else "with"
        phrase += f" {verb} {with_article(mention.accessory)}"
    return phrase


def joined(phrases: Sequence[str], relation: str, rng: Generator) -> str:
    """One, two or three subjects in one phrase."""
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 2:
        return f"{phrases[0]} {_plain_or(rng, RELATIONS[relation], 0.4)} {phrases[1]}"
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _opening(art: str | None, drawn: str | None, rng: Generator) -> str | None:
    if drawn:
        return _plain_or(rng, DRAWN[drawn], 0.5) if rng.random() < 0.75 else None
    roll = rng.random()
    if roll < 0.13:
        return None
    if art is None or roll < 0.28:
        return _plain_or(rng, ANY_STYLE, 0.5)
    return _plain_or(rng, STYLES[art], 0.5)


def caption(
    mentions: Sequence[Mention],
    relation: str,
    art: str | None,
    drawn: str | None,
    scene: str,
    rng: Generator,
) -> str:
    """The caption of a scene.

    Args:
        relation: how the first of two subjects stands to the second (a key of `RELATIONS`).
        art: art set that all subjects come from (a key of `STYLES`), None where they differ.
        drawn: drawing style of the whole picture (a key of `DRAWN`), if any.
    """
    words = joined([mention_phrase(m, rng) for m in mentions], relation, rng)
    opening = _opening(art, drawn, rng)
    place = place_phrase(scene, rng)
    roll = rng.random()
    if opening is None and roll < 0.25:
        words = f"{place}, {words}"
    elif roll < 0.92 or (opening is None and drawn is None):
        pose = f"{_pick(rng, POSES)} " if rng.random() < 0.05 else ""
        words = f"{words} {pose}{place}"
    words = f"{opening} {words}" if opening else words
    if drawn and opening is None:
        words += f", {_pick(rng, ENDINGS[drawn])}"
    return f"{words}, {_pick(rng, PRAISE)}" if rng.random() < 0.05 else words
