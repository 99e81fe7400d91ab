"""A picture of the record: what a concept loses, against the number of concepts in the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from study_options import FIGURES

from sbora_diffusion.plots import FAINT, FREE, GAP, INK, MARGIN, PAPER, TEXT, TITLE

SMOOTH = 2
"""Drawn so many times larger, then averaged."""
WIDTH, HEIGHT, AXIS = 400, 380, 56
DODGE = 2.5
"""Pixels between the whiskers of neighbouring methods."""
TITLES = {
    "pocket-clip": "image alignment, pocket-clip",
    "efficientnet-lite2": "image alignment, EfficientNet-lite2",
    "text_alignment": "text alignment, pocket-clip",
}
COLOURS = ("#111111", "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#56b4e9")
"""Black, then colours that the colour-blind tell apart (Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Curve:
    """One method in one panel: (concepts, change, low, high), broken points left out."""

    label: str
    colour: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Panel:
    """Axes of one figure, and where their area lies in the picture."""

    title: str
    curves: Sequence[Curve]
    left: int
    top: int

    def place(self, count: float, value: float) -> tuple[float, float]:
        """Where a point lies."""
        most = math.log2(max(self.counts)) or 1.0
        low, high = self.span
        x = self.left + (0.03 + 0.94 * math.log2(count) / most) * WIDTH
        return x, self.top + HEIGHT * (high - value) / (high - low)

    @property
    def counts(self) -> list[int]:
        return sorted({point[0] for curve in self.curves for point in curve.points})

    @property
    def span(self) -> tuple[float, float]:
        """All whiskers and zero, out to whole ticks."""
        ends = [end for curve in self.curves for point in curve.points for end in point[2:]]
        low, high = min(0.0, *ends), max(0.0, *ends)
        step = self.step
        return math.floor(low / step) * step, (math.floor(high / step) + 1) * step

    @property
    def step(self) -> float:
        """Between ticks: 1, 2 or 5 of a power of ten, with which there are four to ten."""
        ends = [0.0, *(e for curve in self.curves for point in curve.points for e in point[2:])]
        rough = max(max(ends) - min(ends), 1e-3) / 8
        power = 10.0 ** math.floor(math.log10(rough))
        return next(k * power for k in (1, 2, 5, 10) if k * power >= rough)


def number_picture(record: Mapping[str, Any]) -> Image.Image:
    """A panel for each figure, a curve for each method; whiskers are 95 % intervals over concepts.

    The axis of concepts is logarithmic.
    """
    order = (*FIGURES[1:], FIGURES[0])
    panels = [_panel(record, figure, k) for k, figure in enumerate(order)]
    columns = 4
    rows = -(-len(record["methods"]) // columns)
    size = (
        2 * MARGIN + len(panels) * (AXIS + WIDTH + GAP),
        panels[0].top + HEIGHT + 3 * TEXT + 2 * GAP + rows * (TEXT + GAP) + MARGIN,
    )
    canvas = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), PAPER)
    pen = _Pen(ImageDraw.Draw(canvas))
    text = "change against each concept alone, by the number of concepts in one model"
    pen.text((MARGIN, MARGIN), f"{text}; {len(record['subjects'])} subjects", FAINT)
    for panel in panels:
        _draw(pen, panel)
    top, column = panels[0].top + HEIGHT + 3 * TEXT + 2 * GAP, (size[0] - 2 * MARGIN) // columns
    for k, curve in enumerate(panels[0].curves):
        place = MARGIN + k % columns * column, top + k // columns * (TEXT + GAP) + TEXT // 2
        pen.line([place, (place[0] + 3 * TEXT, place[1])], curve.colour, 3)
        pen.text((place[0] + 3 * TEXT + GAP, place[1]), curve.label, INK, "lm")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def _panel(record: Mapping[str, Any], figure: str, number: int) -> Panel:
    methods = record["methods"]
    curves = [
        Curve(method["method"], COLOURS[k % len(COLOURS)], _points(method["curve"], figure))
        for k, method in enumerate(methods)
    ]
    left = MARGIN + number * (AXIS + WIDTH + GAP) + AXIS
    return Panel(TITLES[figure], curves, left, MARGIN + TEXT + TITLE + 4 * GAP)


def _points(
    curve: Sequence[Mapping[str, Any]], figure: str
) -> list[tuple[int, float, float, float]]:
    found = []
    for point in curve:
        if "broken" not in point:
            change = point["change"][figure]
            low, high = change["interval"] or [change["value"]] * 2
            found.append((point["concepts"], change["value"], low, high))
    return found


class _Pen:
    """Draws at the larger size what is given in pixels of the picture."""

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        large = [(x * SMOOTH, y * SMOOTH) for x, y in points]
        self._pen.line(large, colour, width * SMOOTH, joint="curve")

    def dot(self, place: tuple[float, float], colour: str, radius: float) -> None:
        x, y = place[0] * SMOOTH, place[1] * SMOOTH
        r = radius * SMOOTH
        self._pen.ellipse((x - r, y - r, x + r, y + r), colour)

    def text(
        self, place: tuple[float, float], text: str, colour: str, anchor: str = "la", size=TEXT
    ) -> None:
        font = ImageFont.load_default(size * SMOOTH)
        large = place[0] * SMOOTH, place[1] * SMOOTH
        self._pen.text(large, text, colour, font, anchor=anchor)


def _draw(pen: _Pen, panel: Panel) -> None:
    pen.text((panel.left, panel.top - GAP), panel.title, INK, "ld", TITLE - 2)
    low, high = panel.span
    for k in range(round((high - low) / panel.step) + 1):
        value = low + k * panel.step
        y = panel.place(1, value)[1]
        zero = abs(value) < panel.step / 2
        pen.line([(panel.left, y), (panel.left + WIDTH, y)], FAINT if zero else FREE, 1)
        pen.text((panel.left - 6, y), "0" if zero else f"{value:+.2g}", INK, "rm")
    bottom = panel.top + HEIGHT
    for count in panel.counts:
        x = panel.place(count, 0.0)[0]
        pen.line([(x, bottom), (x, bottom + 5)], FAINT, 1)
        pen.text((x, bottom + 8), str(count), INK, "ma")
    pen.text((panel.left + WIDTH / 2, bottom + TEXT + 14), "concepts in one model", FAINT, "ma")
    for k, curve in reversed(list(enumerate(panel.curves))):  # the first on top
        _draw_curve(pen, panel, curve, DODGE * (k - (len(panel.curves) - 1) / 2))


def _draw_curve(pen: _Pen, panel: Panel, curve: Curve, shift: float) -> None:
    for count, _, low, high in curve.points:
        ends = [panel.place(count, value) for value in (low, high)]
        pen.line([(x + shift, y) for x, y in ends], curve.colour, 1)
    places = [panel.place(count, value) for count, value, *_ in curve.points]
    places = [(x + shift, y) for x, y in places]
    if len(places) > 1:
        pen.line(places, curve.colour, 2)
    for place in places:
        pen.dot(place, curve.colour, 4)
