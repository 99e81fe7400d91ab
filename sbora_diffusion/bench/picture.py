"""A picture of a record: how far each method lies above the frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sbora_diffusion.bench.settings import FLOOR
from sbora_diffusion.plots import FAINT, FREE, GAP, INK, MARGIN, PAPER, TEXT, TITLE

LABELS, BARS, FIGURES = 340, 560, 90
BAR, STEP = 16, 24
OURS, OTHERS = "#1f6f8b", "#c08552"


@dataclass(frozen=True)
class Bar:
    """A ratio to the frozen model, with its quartiles."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


@dataclass(frozen=True)
class Panel:
    """Bars below a heading."""

    title: str
    bars: list[Bar]

    @property
    def height(self) -> int:
        return TITLE + 2 * GAP + STEP * len(self.bars) + 2 * GAP


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """One of each batch size of each shape, of mixed batches, and of the single layer."""
    titles = record["titles"]
    found = []
    if "layer" in record:
        layer = record["layer"]
        named = {name: {"eager": f} for name, f in layer["methods"].items() if name in titles}
        found.append(Panel(layer["title"], _bars(named, titles)))
    for shape in record.get("step", {}).values():
        for size, figures in sorted(shape["batches"].items(), key=lambda pair: int(pair[0])):
            bars = _bars(figures["methods"], titles)
            found.append(Panel(f"{shape['title']}, batch {size}: training step", bars))
    for shape in record.get("mixed_batch", {}).values():
        title = f"{shape['title']}, {shape['rows']} concepts in one batch: forward pass"
        found.append(Panel(title, _bars(shape["methods"], titles)))
    return [panel for panel in found if panel.bars]


def speed_picture(record: Mapping[str, Any]) -> Image.Image:
    """Bars that begin at the frozen model's time; a thin line spans the quartiles."""
    shown = panels(record)
    width = 2 * MARGIN + LABELS + BARS + FIGURES
    height = 2 * MARGIN + 2 * TEXT + sum(panel.height for panel in shown)
    canvas = Image.new("RGB", (width, height), PAPER)
    pen, top = ImageDraw.Draw(canvas), MARGIN
    text = f"time over the frozen model's, {record['device']}"
    pen.text((MARGIN, top), text, FAINT, ImageFont.load_default(TEXT))
    top += 2 * TEXT
    for panel in shown:
        _draw(pen, panel, top)
        top += panel.height
    return canvas


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a file."""
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _bars(methods: Mapping[str, Any], titles: Mapping[str, str]) -> list[Bar]:
    return [
        Bar(
            titles[name] if mode == "eager" else f"{titles[name]}, {mode}",
            figures["over_floor"],
            figures["over_floor_quartiles"][0],
            figures["over_floor_quartiles"][1],
            name.startswith(("sbora", "mixed")),
        )
        for name, modes in methods.items()
        for mode, figures in modes.items()
        if name != FLOOR and mode != "at_best"
    ]


def _draw(pen: ImageDraw.ImageDraw, panel: Panel, top: int) -> None:
    font = ImageFont.load_default(TEXT)
    pen.text((MARGIN, top), panel.title, INK, ImageFont.load_default(TITLE))
    top += TITLE + 2 * GAP
    left = MARGIN + LABELS
    least = min(1.0, *(bar.low for bar in panel.bars))
    most = max(1.05, *(bar.high for bar in panel.bars))

    def place(ratio: float) -> int:
        return left + round(BARS * (ratio - least) / (most - least))

    for k, bar in enumerate(panel.bars):
        y = top + k * STEP
        middle = y + BAR // 2
        ends = sorted((place(1.0), place(bar.value)))
        pen.text((left - GAP, middle), bar.label, INK, font, anchor="rm")
        pen.rectangle((left, y, left + BARS, y + BAR), FREE)
        pen.rectangle((ends[0], y, ends[1], y + BAR), OURS if bar.ours else OTHERS)
        pen.line((place(bar.low), middle, place(bar.high), middle), INK, 2)
        pen.text((left + BARS + GAP, middle), f"{bar.value:.3f}", INK, font, anchor="lm")
    bottom = top + STEP * len(panel.bars) - (STEP - BAR)
    pen.line((place(1.0), top - 4, place(1.0), bottom + 4), INK, 1)
