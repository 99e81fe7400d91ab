"""Pictures of the tables: text alignment against image alignment, a panel for each judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from sbora_diffusion.comparison.lines import Line
from sbora_diffusion.comparison.merge_tables import change, sizes_in, ways_in
from sbora_diffusion.comparison.preset import Preset
from sbora_diffusion.comparison.statistics import by_category
from sbora_diffusion.comparison.tables import TEXT, judges_of, own_lines, read_figure
from sbora_diffusion.evaluation.protocols import RAW_COSINE
from sbora_diffusion.plots import FAINT, FREE, GAP, INK, MARGIN, PAPER, TITLE
from sbora_diffusion.plots import TEXT as SIZE

SIDE, AXIS, DOT, SMOOTH = 420, 60, 9, 2
OURS, OTHERS = "#1f6f8b", "#c08552"
Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One method in one panel: (image, text) alignment, and where merging takes it."""

    label: str
    ours: bool
    start: Place
    end: Place | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    points: Sequence[Point | None]


def single_picture(preset: Preset, lines: Sequence[Line]) -> Image.Image:
    """Each method's concepts alone; those of the first table."""
    own = own_lines(preset, lines, "single")
    entries = next(iter(preset.tables.values()), tuple(preset.methods))
    by_entry = {name: [x for x in own if x["method"] == name] for name in entries}
    present = {name: found for name, found in by_entry.items() if found}
    panels = []
    for judge in judges_of(own):
        points = []
        for name, found in present.items():
            place, title = _place(found, judge, "alone"), preset.methods[name].name
            points.append(place and Point(title, name.startswith("sbora"), place))
        panels.append(Panel(judge, points))
    return picture("each concept alone: text and image alignment, cosines", panels)


def merge_picture(preset: Preset, lines: Sequence[Line]) -> Image.Image:
    """What becomes of each method's concepts when all are merged in the method's own way."""
    own = own_lines(preset, lines, "merge")
    size = sizes_in(own)[-1]
    first: dict[str, Sequence[Line]] = {}
    for (name, _), found in ways_in(preset, own).items():
        first.setdefault(name, found)
    panels = [
        Panel(judge, [_moved(preset, name, found, judge, size) for name, found in first.items()])
        for judge in judges_of(own)
    ]
    return picture(f"before and after merging {size} concepts: text and image alignment", panels)


def _place(lines: Sequence[Line], judge: str, key: str) -> Place | None:
    found = [
        by_category(lines, read_figure(RAW_COSINE.name, figure, key)).get("mean")
        for figure in (judge, TEXT)
    ]
    image, text = found
    return (image.value, text.value) if image and text else None


def _moved(preset: Preset, name: str, lines: Sequence[Line], judge: str, size: int) -> Point | None:
    start = _place(lines, judge, "before")
    if start is None:
        return None
    moves = [
        by_category(lines, lambda line, f=figure: change(size, f, line)).get("mean")  # type: ignore[misc]
        for figure in (judge, TEXT)
    ]
    image, text = moves
    end = (start[0] + image.value, start[1] + text.value) if image and text else None
    return Point(preset.methods[name].name, name.startswith("sbora"), start, end)


def picture(title: str, panels: Sequence[Panel]) -> Image.Image:
    """Numbered dots, with lines from where they were before merging, and a legend."""
    labels: Mapping[int, Point] = {
        k: point for panel in panels for k, point in enumerate(panel.points, 1) if point
    }
    rows = -(-len(labels) // 3)
    width = 2 * MARGIN + len(panels) * (AXIS + SIDE + GAP)
    top = MARGIN + SIZE + TITLE + 3 * GAP
    height = top + SIDE + 4 * SIZE + rows * (SIZE + GAP) + MARGIN
    canvas = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
    pen = _Pen(ImageDraw.Draw(canvas))
    pen.text((MARGIN, MARGIN), title, FAINT)
    for k, panel in enumerate(panels):
        _draw(pen, panel, MARGIN + k * (AXIS + SIDE + GAP) + AXIS, top)
    column = (width - 2 * MARGIN) / 3
    for k, (number, point) in enumerate(sorted(labels.items())):
        x = MARGIN + k // rows * column + DOT
        y = top + SIDE + 4 * SIZE + k % rows * (SIZE + GAP)
        _dot(pen, (x, y), number, point)
        pen.text((x + 2 * DOT, y), point.label, INK, "lm")
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _draw(pen: "_Pen", panel: Panel, left: float, top: float) -> None:
    points = [point for point in panel.points if point]
    ends = [place for p in points for place in (p.start, p.end) if place]
    spans = [_ticks([place[axis] for place in ends]) for axis in (0, 1)]

    def at(place: Place) -> Place:
        shares = [(v - t[0]) / (t[-1] - t[0]) for v, t in zip(place, spans, strict=True)]
        return left + shares[0] * SIDE, top + (1 - shares[1]) * SIDE

    pen.text((left, top - GAP), panel.title, INK, "ld", TITLE - 2)
    for x in spans[0]:
        foot, head = at((x, spans[1][0])), at((x, spans[1][-1]))
        pen.line([foot, head], FREE, 1)
        pen.text((foot[0], foot[1] + 4), f"{x:.3g}", INK, "ma")
    for y in spans[1]:
        begin, stop = at((spans[0][0], y)), at((spans[0][-1], y))
        pen.line([begin, stop], FREE, 1)
        pen.text((begin[0] - 6, begin[1]), f"{y:.3g}", INK, "rm")
    pen.text((left + SIDE / 2, top + SIDE + 1.6 * SIZE), "image alignment", FAINT, "ma")
    for point in points:
        if point.end:
            pen.line([at(point.start), at(point.end)], OURS if point.ours else OTHERS, 2)
            pen.dot(at(point.start), OURS if point.ours else OTHERS, 3)
    for number, numbered in reversed(list(enumerate(panel.points, 1))):
        if numbered:
            _dot(pen, at(numbered.end or numbered.start), number, numbered)


def _dot(pen: "_Pen", place: Place, number: int, point: Point) -> None:
    pen.dot(place, OURS if point.ours else OTHERS, DOT)
    pen.text(place, str(number), PAPER, "mm", SIZE - 4)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round values around these, four to ten, at least two."""
    low, high = min(values), max(values)
    rough = max(high - low, 1e-3) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


class _Pen:
    """Draws at the larger size what is given in pixels of the picture."""

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen

    def line(self, points: Sequence[Place], colour: str, width: int) -> None:
        self._pen.line([(x * SMOOTH, y * SMOOTH) for x, y in points], colour, width * SMOOTH)

    def dot(self, place: Place, colour: str, radius: float) -> None:
        (x, y), r = (place[0] * SMOOTH, place[1] * SMOOTH), radius * SMOOTH
        self._pen.ellipse((x - r, y - r, x + r, y + r), colour)

    def text(
        self, place: Place, text: str, colour: str, anchor: str = "la", size: int = SIZE
    ) -> None:
        font = ImageFont.load_default(size * SMOOTH)
        self._pen.text((place[0] * SMOOTH, place[1] * SMOOTH), text, colour, font, anchor=anchor)
