"""The plots of the diagnosis, from its record alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from crosstalk_study.plan import KEYS_VALUES, QUERIES_OUT, SELF, TEXT
from PIL import Image, ImageDraw

from diagnosis_study.axes import (
    FINE,
    Axes,
    canvas,
    decades,
    finished,
    font,
    legend,
    note,
    round_ticks,
)
from diagnosis_study.plan import ALL, OTHERS
from sbora_diffusion.core.functional import VARIANTS
from sbora_diffusion.plots import FAINT, FREE, GAP, INK, MARGIN
from sbora_diffusion.plots import TEXT as SIZE

Row = Mapping[str, Any]

PANEL, HEIGHT, LEFT, BETWEEN = 460, 340, 80, 110
GROUP_COLOURS = {
    ALL: "#202020",
    TEXT: "#8e44ad",
    KEYS_VALUES: "#c0392b",
    QUERIES_OUT: "#d98e04",
    SELF: "#2471a3",
}
ENERGY = (
    "Energy that the others' updates add to the layers' outputs, over that of the concept's own; "
    "bars: how much of it is due to"
)
SHARES = {
    "constant": ("the mean activation of the concept's own prompts", "#1f6f8b"),
    "common": ("what subtracting the mean of all concepts' prompts removes", "#7fb3c8"),
    "outliers": ("the loudest 1 % of the channels that are read", "#c08552"),
}
BAR, BARS = 13, 56
FAMILIES = {"fa": ("#a9cfe8", "#08306b"), "fb": ("#fdc38d", "#8c2d04")}
"""Colours of the lowest and of the highest rate."""


def groups_plot(record: Row) -> Image.Image:
    """Crosstalk by group of layers and timestep at the default rates, and parts of its energy."""
    shown = [row for row in record["rows"] if "parts" in row and row["rate"] == 1.0]
    bottom = 150 + HEIGHT + 2 * (SIZE + 2 * GAP) + SIZE
    width = 2 * MARGIN + LEFT + len(VARIANTS) * (PANEL + BETWEEN)
    picture = canvas(width, bottom + 40 + len(SHARES) * 24 + (len(OTHERS) - 1) * BARS + MARGIN)
    pen = ImageDraw.Draw(picture)
    text = (
        f"{len(record['subjects'])} concepts in one model, default rates, "
        f"{shown[0]['steps']} steps: what the others change in a concept's prediction"
    )
    note(pen, MARGIN, text)
    entries = [(_group_label(k), colour) for k, colour in GROUP_COLOURS.items()]
    legend(pen, MARGIN, MARGIN + SIZE + GAP, entries, 240)
    span = decades([v for row in shown for k in OTHERS for v in _times(row, k)])
    for k, row in enumerate(shown):
        left = MARGIN + LEFT + k * (PANEL + BETWEEN)
        _timesteps(pen, Axes((left, 150, left + PANEL, 150 + HEIGHT), (0, 1000), span), row, record)
        _parts(pen, row, left, bottom + 40 + len(SHARES) * 24)
    note(pen, bottom, ENERGY)
    for k, entry in enumerate(SHARES.values()):
        legend(pen, MARGIN, bottom + 24 * (k + 1), [entry], 0)
    return finished(picture)


def _times(row: Row, group: str) -> Sequence[float]:
    return row["crosstalk"][group]["by_timestep"]


def _group_label(group: str) -> str:
    crossing = (KEYS_VALUES, QUERIES_OUT)
    named = {ALL: "all layers", SELF: "self-attention"}
    return f"cross-attention {group}" if group in crossing else named.get(group, group)


def _timesteps(pen: ImageDraw.ImageDraw, axes: Axes, row: Row, record: Row) -> None:
    title, ticks = row["variant"].upper(), record["timesteps"]
    axes.draw(pen, title, "timestep (1000: noise alone)", "crosstalk, ratio of squares", ticks)
    for group, colour in GROUP_COLOURS.items():
        axes.curve(pen, list(zip(ticks, _times(row, group), strict=True)), colour)


def _parts(pen: ImageDraw.ImageDraw, row: Row, left: int, top: int) -> None:
    """Three bars from 0 to 1 for each group of layers."""
    width = PANEL - 60
    for k, (group, parts) in enumerate(row["parts"].items()):
        y = top + k * BARS
        loud = parts["others_over_own"]["value"]
        label = f"{row['variant'].upper()}, {_group_label(group)}: {loud:.3g}"
        pen.text((FINE * left, FINE * (y - 2)), label, INK, font(), anchor="ls")
        for j, (part, (_, colour)) in enumerate(SHARES.items()):
            share, above = parts[part]["share"], y + 2 + j * BAR
            box = [FINE * edge for edge in (left, above, left + width, above + BAR - 3)]
            pen.rectangle(box, FREE)
            filled = left + max(0.0, min(share, 1.0)) * width
            pen.rectangle((*box[:2], FINE * filled, box[3]), colour)
            middle = FINE * (left + width + GAP), (box[1] + box[3]) / 2
            pen.text(middle, f"{share:.0%}", FAINT, font(SIZE - 2), anchor="lm")


def gain_plot(record: Row) -> Image.Image:
    """Crosstalk in all layers against the solo gain, as curves over the steps for each rate."""
    rates = sorted({row["rate"] for row in record["rows"]})
    features = [k for k in record["class_word"] if k != "text_alignment"]
    bottom = 110 + HEIGHT + 2 * (SIZE + 2 * GAP) + SIZE
    width = 2 * MARGIN + LEFT + max(2, len(features)) * (PANEL + BETWEEN)
    picture = canvas(width, bottom + 2 * 28 + MARGIN)
    pen = ImageDraw.Draw(picture)
    steps = sorted({row["steps"] for row in record["rows"]})
    note(pen, MARGIN, f"{len(record['subjects'])} concepts, alone and in one model; {_dots(steps)}")
    span = decades([row["crosstalk"][ALL]["value"] for row in record["rows"]])
    for k, feature in enumerate(features):
        left = MARGIN + LEFT + k * (PANEL + BETWEEN)
        ends = _ends([row["gain"][feature]["value"] for row in record["rows"]])
        axes = Axes((left, 110, left + PANEL, 110 + HEIGHT), ends, span)
        x_label = "image alignment of a concept alone, above the bare class word"
        ratio = "crosstalk in all layers, ratio of squares"
        axes.draw(pen, feature, x_label, ratio, round_ticks(*ends))
        _curves(pen, axes, record, feature, rates)
    for k, variant in enumerate(VARIANTS):
        entries = [
            (f"{variant.upper()}, rates x {rate:g}", _shade(variant, rates, rate)) for rate in rates
        ]
        legend(pen, MARGIN + LEFT, bottom + 28 * k, entries, 170)
    return finished(picture)


def _dots(steps: Sequence[int]) -> str:
    return f"dots: after {', '.join(map(str, steps))} steps, a larger one is later"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """A little beyond all values."""
    width = max(max(values) - min(values), 1e-3)
    return min(values) - 0.05 * width, max(values) + 0.05 * width


def _curves(
    pen: ImageDraw.ImageDraw, axes: Axes, record: Row, feature: str, rates: Sequence[float]
) -> None:
    for variant in VARIANTS:
        for rate in rates:
            own = [r for r in record["rows"] if (r["variant"], r["rate"]) == (variant, rate)]
            points = [(r["gain"][feature]["value"], r["crosstalk"][ALL]["value"]) for r in own]
            if points:
                sizes, colour = [3 + k for k in range(len(own))], _shade(variant, rates, rate)
                axes.curve(pen, points, colour, sizes)


def _shade(variant: str, rates: Sequence[float], rate: float) -> tuple[int, ...]:
    """Between the family's two colours, by the rate's place among all."""
    light, dark = ([int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in FAMILIES[variant])
    share = rates.index(rate) / max(1, len(rates) - 1)
    return tuple(round(a + share * (b - a)) for a, b in zip(light, dark, strict=True))
