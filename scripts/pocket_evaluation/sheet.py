"""What the base drew, right and wrong, with the prompts, beside real composed pictures."""

import textwrap
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from pocket_evaluation.base_section import Judged
from sbora_diffusion.contact_sheet import INK, PAPER, TILE, Sheet

COLUMNS = 8
SHOWN = 5  # right ones and wrong ones of each set
BESIDE = 3  # of them with their real picture
PICTURE, FONT, LINE, LETTERS = 150, 11, 13, 33


def base_sheet(judged: Mapping[str, Judged]) -> Image.Image:
    """For each set a row of right ones and one of wrong ones, the first few with the real one."""
    sheet = Sheet(columns=COLUMNS)
    for name, found in judged.items():
        right = found.right(found.drawn)
        for verdict in (True, False):
            rows = [k for k in range(len(found.cases)) if _all(right, k) == verdict][:SHOWN]
            if rows:
                word = "all right" if verdict else "something wrong"
                sheet.heading(f"{name.replace('_', ' ')}: {word} in the judge's eyes")
                tiles = [_tiles(found, k, beside=n < BESIDE) for n, k in enumerate(rows)]
                sheet.row([tile for group in tiles for tile in group])
    return sheet.image()


def _all(right: Mapping[str, list[bool]], case: int) -> bool:
    return all(answers[case] for answers in right.values())


def _tiles(found: Judged, case: int, beside: bool) -> list[tuple[Image.Image, str]]:
    wrong = [
        found.drawn[ask][case]
        for ask, truths in found.truths.items()
        if found.drawn[ask][case] != truths[case]
    ]
    label = f"found: {', '.join(dict.fromkeys(wrong))}"[:28] if wrong else "right"
    text = found.cases[case].prompt.text()
    tiles = [(captioned(found.pictures[case], text), label)]
    if beside:
        tiles.append((captioned(found.composed[case], "the same content, composed"), "real"))
    return tiles


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture with its text below it, as one tile."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(picture.resize((PICTURE, PICTURE)), ((TILE - PICTURE) // 2, 0))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(FONT)
    for number, line in enumerate(textwrap.wrap(text, LETTERS)[: (TILE - PICTURE) // LINE]):
        pen.text((2, PICTURE + 2 + number * LINE), line, INK, font)
    return tile
