"""The subjects and the recipes."""

from typing import Any

SUBJECTS = (
    "blueberrycupcake", "brownhorse", "cuckooclock", "electricguitar", "fedora", "flamingo",
    "floralteapot", "pinkblouse", "poodle", "redsofa", "rucksack", "suitman", "unicorn",
    "whiterabbit", "woodencar", "woodentoy",
)  # fmt: skip
"""Held-out subjects that are not among the committed concepts: the default recipe is chosen on
these, so that what is measured on the committed ones afterwards was not tuned to them."""

FORMER = {
    "steps": 300,
    "rate_tokens": 5e-3,
    "rate_text_encoder": 5e-4,
    "schedule": "cosine",
    "vectors": 1,
}
"""The default before, save that a noun of several tokens gave its placeholder as many vectors."""

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "former default": FORMER,
    **{f"default, but {key} {value}": {key: value} for key, value in FORMER.items()},
    "default, but batch_size 8": {"batch_size": 8},
    "default, but steps 800": {"steps": 800},
    "default, but rank 32": {"rank": 32},
    "default, but vectors 8": {"vectors": 8},
    "default, but rate_unet 0.0015": {"rate_unet": 1.5e-3},
    "default, but rate_unet 0.006": {"rate_unet": 6e-3},
    "default, but no flip": {"flip": False},
    "default, but targets unet": {"targets": "unet"},
    "fb": {"variant": "fb", "rate_unet": 1e-3, "rate_text_encoder": 1e-3},
}
"""Name → what it changes in the default."""
