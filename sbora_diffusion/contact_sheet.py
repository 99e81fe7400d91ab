"""Labelled pictures in rows, as one picture."""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN = 192, 12, 24
HEADING, LABEL = 22, 15
PAPER, INK, FAINT = "white", "#202020", "#606060"


@dataclass
class Sheet:
    """Collects headings and rows of (picture, label), then draws them below each other."""

    columns: int
    blocks: list[str | list[tuple[Image.Image, str]]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.blocks.append(text)

    def row(self, pictures: list[tuple[Image.Image, str]]) -> None:
        """At most `columns` pictures; more are cut off."""
        self.blocks.append(pictures[: self.columns])

    def image(self) -> Image.Image:
        width = 2 * MARGIN + self.columns * TILE + (self.columns - 1) * GAP
        heights = [_height(block) for block in self.blocks]
        sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights)), PAPER)
        pen, top = ImageDraw.Draw(sheet), MARGIN
        for block, height in zip(self.blocks, heights, strict=True):
            if isinstance(block, str):
                pen.text((MARGIN, top + GAP), block, INK, ImageFont.load_default(HEADING))
            else:
                _draw_row(sheet, pen, block, top)
            top += height
        return sheet


def _height(block: str | list[tuple[Image.Image, str]]) -> int:
    if isinstance(block, str):
        return HEADING + 2 * GAP
    return TILE + GAP + (LABEL + 6 if any(label for _, label in block) else 0)


def _draw_row(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, row: list[tuple[Image.Image, str]], top: int
) -> None:
    font = ImageFont.load_default(LABEL)
    for column, (picture, label) in enumerate(row):
        left = MARGIN + column * (TILE + GAP)
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + TILE + 3), label, FAINT, font)
