"""The world's sprites: pixels and what is known about each one."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from world.backgrounds import FLAT_COLOURS

COLOURS = tuple(FLAT_COLOURS)
DOMINANT = 0.6  # share of the opaque pixels that makes a colour the subject's


@dataclass(frozen=True)
class Sprite:
    noun: str
    held_out: str | None  # name of a held-out subject: for the judge only
    kind: str  # "subject" | "accessory"
    style: str
    category: str
    top: float  # upper edge of the visible part, −1..1 in sprite coordinates
    bottom: float
    head: float  # horizontal centre of its upper fifth, −1..1
    half_width: float
    colour: str | None  # the colour that most of it has
    gamma: float  # brings the mean lightness to one half, for tinting


@dataclass(frozen=True)
class SpriteBank:
    """All sprites: pixels (N, 4, 96, 96) uint8 and one `Sprite` each."""

    pixels: Tensor
    sprites: list[Sprite]

    @classmethod
    def load(cls, folder: Path, held_out: bool = False) -> "SpriteBank":
        """Read `sprites.json` and `sprites.bin` as `pack_sprites.py` writes them.

        Args:
            held_out: with the held-out subjects. Never for training the base.
        """
        entries = json.loads((folder / "sprites.json").read_text())["sprites"]
        entries = [e for e in entries if held_out or e["held_out"] is None]
        blob = (folder / "sprites.bin").read_bytes()
        pixels = np.stack([_decode(blob[e["offset"] : e["offset"] + e["length"]]) for e in entries])
        sprites = [_describe(e, p) for e, p in zip(entries, pixels, strict=True)]
        return cls(torch.from_numpy(pixels), sprites)


def _decode(webp: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(webp)).convert("RGBA")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _describe(entry: dict, pixels: np.ndarray) -> Sprite:
    alpha = pixels[3]
    rows, columns = np.nonzero(alpha.max(1) > 60)[0], np.nonzero(alpha.max(0) > 60)[0]
    upper = alpha[rows[0] : rows[0] + max(1, len(rows) // 5)].astype(np.float64).sum(0)
    size = alpha.shape[0]
    head = float((upper * np.arange(size)).sum() / upper.sum())
    seen = pixels[:3, alpha > alpha.max() // 2].T.astype(np.float64) / 255
    lightness = float(np.clip((seen @ (0.299, 0.587, 0.114)).mean(), 0.08, 0.92))
    return Sprite(
        noun=entry["noun"],
        held_out=entry["held_out"],
        kind=entry["kind"],
        style=entry["style"],
        category=entry["category"],
        top=2 * rows[0] / size - 1,
        bottom=2 * (rows[-1] + 1) / size - 1,
        head=2 * head / size - 1,
        half_width=(columns[-1] - columns[0]) / size,
        colour=dominant_colour(seen),
        gamma=float(np.log(0.5) / np.log(lightness)),
    )


def dominant_colour(rgb: np.ndarray) -> str | None:
    """The name of the colour that most pixels (N, 3) in 0..1 have, None where none prevails."""
    names = _colour_names(rgb)
    values, counts = np.unique(names, return_counts=True)
    share = counts.max() / len(names)
    return str(values[counts.argmax()]) if share >= DOMINANT else None


def _colour_names(rgb: np.ndarray) -> np.ndarray:
    high, low = rgb.max(1), rgb.min(1)
    spread = np.maximum(high - low, 1e-6)
    r, g, b = rgb.T
    hue = np.select(
        [high == r, high == g],
        [((g - b) / spread) % 6, (b - r) / spread + 2],
        (r - g) / spread + 4,
    )
    hue, saturation = 60 * hue, spread / np.maximum(high, 1e-6)
    pale = (saturation < 0.5) & (high > 0.75)
    return np.select(
        [
            high < 0.2,
            (saturation < 0.15) & (high > 0.85),
            saturation < 0.15,
            (hue < 15) | (hue >= 345),
            hue < 45,
            hue < 68,
            hue < 165,
            hue < 255,
            hue < 300,
        ],
        [
            "black",
            "white",
            "grey",
            np.where(pale, "pink", "red"),
            np.where((high < 0.62) | (saturation < 0.6), "brown", "orange"),
            "yellow",
            "green",
            "blue",
            "purple",
        ],
        "pink",
    )
