"""Axes of a plot: a linear one to the right, a logarithmic one upwards, curves and a legend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sbora_diffusion.plots import FAINT, FREE, GAP, INK, MARGIN, PAPER, TEXT, TITLE

FINE = 2
"""Plots are drawn so much larger, then reduced, which smooths their lines."""
Point = tuple[float, float]


def font(size: int = TEXT) -> Any:
    return ImageFont.load_default(FINE * size)


def canvas(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (FINE * width, FINE * height), PAPER)


def finished(picture: Image.Image) -> Image.Image:
    return picture.reduce(FINE)


@dataclass(frozen=True)
class Axes:
    """Where the axes lie in the picture, in pixels of the finished one, and what they span.

    Attributes:
        box: left, top, right, bottom of the area between them.
        x: from, to.
        decades: powers of ten at the lower and the upper end of the other axis.
    """

    box: tuple[int, int, int, int]
    x: tuple[float, float]
    decades: tuple[int, int]

    def place(self, point: Point) -> tuple[float, float]:
        """In pixels of the large picture; values beyond the axes lie on their ends."""
        (left, top, right, bottom), (low, high) = self.box, self.decades
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        upwards = (math.log10(max(point[1], 10.0**low)) - low) / (high - low)
        x = left + min(max(across, 0.0), 1.0) * (right - left)
        return FINE * x, FINE * (bottom - min(upwards, 1.0) * (bottom - top))

    def rungs(self) -> list[float]:
        """What is written beside the logarithmic axis: powers of ten, and between them 2 and 5
        times these where there are few."""
        low, high = self.decades
        steps = (1.0, 2.0, 5.0) if high - low <= 2 else (1.0,)
        return [step * 10.0**k for k in range(low, high) for step in steps] + [10.0**high]

    def draw(
        self, pen: ImageDraw.ImageDraw, title: str, x_label: str, y_label: str, ticks: Sequence[Any]
    ) -> None:
        """Frame, grid and labels; `y_label` is written above the upper end."""
        left, top, right, bottom = (FINE * edge for edge in self.box)
        pen.text((left, top - FINE * (TITLE + TEXT + 2 * GAP)), title, INK, font(TITLE))
        pen.text((left, top - FINE * (TEXT + GAP)), y_label, FAINT, font())
        for value in self.rungs():
            _, y = self.place((self.x[0], value))
            pen.line((left, y, right, y), "#b8b8b8" if value == 1.0 else FREE, FINE)
            pen.text((left - FINE * GAP, y), f"{value:g}", INK, font(), anchor="rm")
        for tick in ticks:
            x, _ = self.place((tick, 1.0))
            pen.line((x, top, x, bottom), FREE, FINE)
            pen.text((x, bottom + FINE * GAP), f"{tick:g}", INK, font(), anchor="mt")
        pen.rectangle((left, top, right, bottom), outline=FAINT, width=FINE)
        middle = (left + right) / 2, bottom + FINE * (2 * GAP + TEXT)
        pen.text(middle, x_label, FAINT, font(), anchor="mt")

    def curve(
        self,
        pen: ImageDraw.ImageDraw,
        points: Sequence[Point],
        colour: Any,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """A line through points, with dots of these radii."""
        places = [self.place(point) for point in points]
        pen.line(places, colour, 2 * FINE, joint="curve")
        for (x, y), size in zip(places, sizes or [3] * len(places), strict=True):
            radius = FINE * size
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values above 0."""
    logs = [math.log10(value) for value in values if value > 0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return low, max(high, low + 1)


def round_ticks(low: float, high: float) -> list[float]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten that lie between two values."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(s * power for s in (1, 2, 5) if s * power <= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def legend(
    pen: ImageDraw.ImageDraw, left: int, top: int, entries: Sequence[tuple[str, Any]], width: int
) -> None:
    """Coloured squares and what they mean, `width` pixels for each."""
    for k, (text, colour) in enumerate(entries):
        x, y = FINE * (left + k * width), FINE * top
        pen.rectangle((x, y, x + FINE * TEXT, y + FINE * TEXT), colour)
        pen.text((x + FINE * (TEXT + 8), y + FINE * TEXT / 2), text, INK, font(), anchor="lm")


def note(pen: ImageDraw.ImageDraw, top: int, text: str) -> None:
    """A line of small print."""
    pen.text((FINE * MARGIN, FINE * top), text, FAINT, font())
