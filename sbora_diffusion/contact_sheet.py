"""Labelled pictures in rows, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN = 192, 12, 24
HEADING, LABEL = 22, 15
PAPER, INK, FAINT = "white", "#202020", "#606060"


Row = Sequence[tuple[Image.Image, str]]


@dataclass
class Sheet:
    """Collects headings and rows of (picture, label), then draws them below each other."""

    columns: int
    blocks: list[tuple[Literal["heading", "row"], Any]] = field(default_factory=list)

    def heading(self, *texts: str) -> None:
        """Texts side by side, each above its share of the columns."""
        self.blocks.append(("heading", texts))

    def row(self, pictures: Row) -> None:
        """At most `columns` pictures; more are cut off."""
        self.blocks.append(("row", pictures[: self.columns]))

    def image(self) -> Image.Image:
        width = 2 * MARGIN + self.columns * (TILE + GAP) - GAP
        heights = [_height(*block) for block in self.blocks]
        sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights)), PAPER)
        pen, top = ImageDraw.Draw(sheet), MARGIN
        for (kind, content), height in zip(self.blocks, heights, strict=True):
            if kind == "heading":
                self._draw_heading(pen, content, top)
            else:
                _draw_row(sheet, pen, content, top)
            top += height
        return sheet

    def _draw_heading(self, pen: ImageDraw.ImageDraw, texts: tuple[str, ...], top: int) -> None:
        share = self.columns * (TILE + GAP) // len(texts)
        for k, text in enumerate(texts):
            pen.text((MARGIN + k * share, top + GAP), text, INK, ImageFont.load_default(HEADING))


def _height(kind: str, content: Any) -> int:
    if kind == "heading":
        return HEADING + 2 * GAP
    return TILE + GAP + (LABEL + 6 if any(label for _, label in content) else 0)


def _draw_row(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    font = ImageFont.load_default(LABEL)
    for column, (picture, label) in enumerate(row):
        left = MARGIN + column * (TILE + GAP)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + TILE + 3), label, FAINT, font)
