"""Prompts as people might write them, with words that no caption has, beside plain ones."""

from world.captions import PLACES

from pocket_evaluation.questions import Prompt

FREE: tuple[tuple[str, str, str], ...] = (  # free wording, noun, scene
    ("my grandmother's cosy dog enjoying the beach, unbelievable", "dog", "beach"),
    ("a majestic lion strolling through fresh snow, award-winning", "lion", "snow"),
    ("OMG look at this adorable penguin somewhere in the desert!!!", "penguin", "desert"),
    ("an astonishingly shiny teapot, forgotten deep in the forest", "teapot", "forest"),
    ("a weary astronaut drifting through space, cinematic mood", "astronaut", "space"),
    ("trending: a grumpy cat guarding the library", "cat", "library"),
    ("would you believe it, an elephant performing on a stage", "elephant", "stage"),
    ("a rusty bicycle leaning somewhere along the street", "bicycle", "street"),
    ("a bewildered octopus in the kitchen, chaos everywhere", "octopus", "kitchen"),
    ("a dragon terrorising the castle, epic fantasy", "dragon", "castle"),
    ("portrait of a melancholic robot on a rainy day", "robot", "rain"),
    ("a zebra grazing peacefully in a meadow, golden hour", "zebra", "meadow"),
    ("an abandoned piano under water, surreal", "piano", "under_water"),
    ("a gigantic, juicy strawberry near a volcano, hyperreal", "strawberry", "volcano"),
    ("uncle Bob's beloved tractor on the farm", "tractor", "farm"),
    ("a taxi rushing through a city at night, bokeh", "taxi", "city_at_night"),
    ("a lone wolf contemplating the mountains at sunset", "wolf", "mountains_at_sunset"),
    ("somebody left an umbrella in the living room again", "umbrella", "room"),
    ("product shot of an elegant guitar in a studio, crisp", "guitar", "studio"),
    ("a helicopter hovering over the beach, drone footage", "helicopter", "beach"),
    ("squishy frog vibes in the forest, cottagecore", "frog", "forest"),
    ("an owl who pretends to study in the library", "owl", "library"),
    ("a snowman melting in the desert heat, tragic", "snowman", "desert"),
    ("the world's fanciest birthday cake on a kitchen counter", "birthday cake", "kitchen"),
    ("a rocket blasting through outer space, retrofuturism", "rocket", "space"),
    ("a squeaky clean bathtub, inexplicably in a meadow", "bathtub", "meadow"),
    ("a gorilla chilling on the street like nobody's business", "gorilla", "street"),
    ("a turtle gliding at the bottom of the ocean, documentary", "turtle", "under_water"),
    ("a heroic firefighter facing an erupting volcano", "firefighter", "volcano"),
    ("a delightful sunflower blooming in the rain, whimsical", "sunflower", "rain"),
)


def plain(noun: str, scene: str) -> Prompt:
    """The same content in the captions' words."""
    return Prompt("photo", (noun,), scene, PLACES[scene][0])
