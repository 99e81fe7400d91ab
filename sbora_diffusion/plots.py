"""Pictures for people: who owns which columns or rows, and how loud concepts are to each other."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, FREE = "white", "#202020", "#707070", "#e9e9e9"
MARGIN, GAP, TITLE, TEXT = 24, 10, 20, 14
STRIP_WIDTH, STRIP, LINE = 960, 22, 3
CELL = 56

# Ink on paper to a dark red by way of yellow and orange; at 0, 1/4, 1/2, 3/4 and 1.
_HEAT = ((255, 255, 255), (255, 237, 160), (253, 141, 60), (189, 0, 38), (70, 0, 20))

# Saturation and value; hues a golden angle apart come close again after 8, 13 and 21 steps.
_STRENGTHS = ((0.72, 0.82), (0.5, 0.6), (0.4, 0.93), (0.9, 0.48))
_SCALE = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)

Colour = str | tuple[int, int, int]


@dataclass(frozen=True)
class Strips:
    """Layers of one kind and width.

    Attributes:
        title: written above.
        width: columns or rows of each layer.
        ranges: concept → [start, stop) in the order in which indices are handed out.
        layers: one for each layer: concept → the indices that it owns there.
    """

    title: str
    width: int
    ranges: Mapping[str, tuple[int, int]]
    layers: Sequence[Mapping[str, Sequence[int]]] = ()


@dataclass(frozen=True)
class Section:
    """All layers of one base and variant, with a heading, a line of text and a legend."""

    title: str
    text: str
    strips: Sequence[Strips]
    legend: Mapping[str, str]


def ownership_picture(sections: Sequence[Section], highlight: str | None = None) -> Image.Image:
    """A strip per group of layers in the order of allocation; below it a line for each layer.

    Args:
        highlight: the only concept in colour; all by default.
    """
    colours = [_palette(list(section.legend), highlight) for section in sections]
    height = 2 * MARGIN + sum(_section_height(section) for section in sections)
    canvas = Image.new("RGB", (STRIP_WIDTH + 2 * MARGIN, height), PAPER)
    top = MARGIN
    for section, palette in zip(sections, colours, strict=True):
        _draw_section(canvas, section, palette, top)
        top += _section_height(section)
    return canvas


@dataclass(frozen=True)
class Heat:
    """A matrix of ratios with its labels; None is a cell that has no value."""

    title: str
    text: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]


def heat_picture(maps: Sequence[Heat]) -> Image.Image:
    """Heat maps below each other: white is 0, orange is 1, dark red is far above."""
    sizes = [_heat_size(heat) for heat in maps]
    width = max(*(size[0] for size in sizes), len(_SCALE) * CELL) + 2 * MARGIN
    height = 2 * MARGIN + sum(size[1] for size in sizes) + 28
    canvas = Image.new("RGB", (width, height), PAPER)
    top = MARGIN
    for heat, (_, height) in zip(maps, sizes, strict=True):
        _draw_heat(canvas, heat, top)
        top += height
    pen = ImageDraw.Draw(canvas)
    for k, ratio in enumerate(_SCALE):
        _draw_cell(pen, (MARGIN + k * CELL, top, CELL, 28), ratio)
    return canvas


def heat_colour(ratio: float) -> tuple[int, int, int]:
    """0 → white, 1 → orange, ∞ → nearly black; equal steps of ratio / (1 + ratio)."""
    place = 4 * (1.0 if math.isinf(ratio) else ratio / (1 + ratio))
    low = min(int(place), 3)
    a, b, share = _HEAT[low], _HEAT[low + 1], place - low
    red, green, blue = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _palette(names: Sequence[str], highlight: str | None) -> dict[str, Colour]:
    return {
        name: _distinct(k) if highlight in (None, name) else "#c4c4c4"
        for k, name in enumerate(names)
    }


def _distinct(k: int) -> tuple[int, int, int]:
    """Hues a golden angle apart, so that any number of neighbours differ, in four strengths."""
    saturation, value = _STRENGTHS[k % 2 + 2 * (k // 8 % 2)]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + k * 0.618034) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _legend_columns(section: Section) -> int:
    widest = max((_font(TEXT).getlength(text) for text in section.legend.values()), default=0)
    return max(1, int(STRIP_WIDTH // (widest + 3 * TEXT)))


def _section_height(section: Section) -> int:
    legend = -(-len(section.legend) // _legend_columns(section)) * (TEXT + 8)
    strips = sum(_strips_height(strips) for strips in section.strips)
    return TITLE + TEXT + 4 * GAP + legend + strips + 2 * GAP


def _strips_height(strips: Strips) -> int:
    return TEXT + 6 + STRIP + 3 + LINE * len(strips.layers) + 2 * GAP


def _draw_section(
    canvas: Image.Image, section: Section, palette: Mapping[str, Colour], top: int
) -> None:
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, top), section.title, INK, _font(TITLE))
    top += TITLE + GAP
    pen.text((MARGIN, top), section.text, FAINT, _font(TEXT))
    top += TEXT + 2 * GAP
    columns = _legend_columns(section)
    for k, (name, text) in enumerate(section.legend.items()):
        left, y = MARGIN + k % columns * STRIP_WIDTH // columns, top + k // columns * (TEXT + 8)
        pen.rectangle((left, y + 2, left + TEXT, y + 2 + TEXT), palette[name])
        pen.text((left + TEXT + 8, y), text, INK, _font(TEXT))
    top += -(-len(section.legend) // columns) * (TEXT + 8) + GAP
    for strips in section.strips:
        _draw_strips(canvas, strips, palette, top)
        top += _strips_height(strips)


def _draw_strips(
    canvas: Image.Image, strips: Strips, palette: Mapping[str, Colour], top: int
) -> None:
    ImageDraw.Draw(canvas).text((MARGIN, top), strips.title, INK, _font(TEXT))
    top += TEXT + 6
    spans = {name: range(*bounds) for name, bounds in strips.ranges.items()}
    canvas.paste(_line(strips.width, spans, palette, STRIP), (MARGIN, top))
    top += STRIP + 3
    for k, layer in enumerate(strips.layers):
        canvas.paste(_line(strips.width, layer, palette, LINE), (MARGIN, top + k * LINE))


def _line(
    width: int, owners: Mapping[str, Sequence[int]], palette: Mapping[str, Colour], height: int
) -> Image.Image:
    """One pixel an index, then stretched."""
    line = Image.new("RGB", (width, 1), FREE)
    pen = ImageDraw.Draw(line)
    for name, indices in owners.items():
        pen.point([(index, 0) for index in indices if index < width], palette[name])
    # Layers wider than the picture are averaged, so that no column is lost.
    filter_ = Image.Resampling.NEAREST if width <= STRIP_WIDTH else Image.Resampling.BOX
    return line.resize((STRIP_WIDTH, height), filter_)


def _heat_cell(heat: Heat) -> int:
    """Narrower cells, without figures, where there are many."""
    return CELL if len(heat.columns) <= 20 else max(12, 20 * CELL // len(heat.columns))


def _heat_margins(heat: Heat) -> tuple[int, int]:
    """Room for the labels of the rows on the left and of the columns above, which are upright."""
    left, above = (
        int(max(_font(TEXT).getlength(label) for label in labels)) + GAP
        for labels in (heat.rows, heat.columns)
    )
    return left, above


def _heat_size(heat: Heat) -> tuple[int, int]:
    left, above = _heat_margins(heat)
    cell, row = _heat_cell(heat), min(_heat_cell(heat), 28)
    text = max(_font(TITLE).getlength(heat.title), _font(TEXT).getlength(heat.text))
    width = max(left + cell * len(heat.columns), int(text))
    return width, TITLE + TEXT + 3 * GAP + above + row * len(heat.rows) + 3 * GAP


def _draw_heat(canvas: Image.Image, heat: Heat, top: int) -> None:
    pen, (left, above) = ImageDraw.Draw(canvas), _heat_margins(heat)
    cell, row = _heat_cell(heat), min(_heat_cell(heat), 28)
    pen.text((MARGIN, top), heat.title, INK, _font(TITLE))
    pen.text((MARGIN, top + TITLE + GAP), heat.text, FAINT, _font(TEXT))
    left, top = left + MARGIN, top + TITLE + TEXT + 3 * GAP + above
    for k, label in enumerate(heat.columns):
        upright = _upright(label)
        x, y = left + k * cell + (cell - upright.width) // 2, top - upright.height
        canvas.paste(upright, (x, y))
    for k, label in enumerate(heat.rows):
        y = top + k * row
        pen.text((left - GAP, y + row // 2), label, INK, _font(TEXT), anchor="rm")
        for j, value in enumerate(heat.values[k]):
            _draw_cell(pen, (left + j * cell, y, cell, row), value)


def _upright(label: str) -> Image.Image:
    """A label that reads from below, as long as `_heat_margins` leaves room for."""
    font = _font(TEXT)
    flat = Image.new("RGB", (int(font.getlength(label)) + GAP, TEXT + 6), PAPER)
    ImageDraw.Draw(flat).text((GAP // 2, 1), label, INK, font)
    return flat.rotate(90, expand=True)


def _draw_cell(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], value: float | None
) -> None:
    x, y, width, height = box
    fill = "#f2f2f2" if value is None else heat_colour(value)
    pen.rectangle((x, y, x + width - 2, y + height - 2), fill)
    if width >= CELL:
        text = "-" if value is None else f"{value:.2f}"
        dark = value is not None and value > 1.5
        middle = (x + width // 2 - 1, y + height // 2 - 1)
        pen.text(middle, text, PAPER if dark else INK, _font(TEXT), anchor="mm")
