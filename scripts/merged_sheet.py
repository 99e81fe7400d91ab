"""What several concepts in one model look like: alone, added, calibrated, and refined.

python scripts/merged_sheet.py trained/*.safetensors -o docs/calibrated.jpg
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.contact_sheet import Sheet
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import draw
from sbora_diffusion.diffusion.refinement import STEPS

PLACES = ("on the beach", "in the snow", "in space", "in a kitchen", "in the forest")
WITHOUT = ("a photo of a cat in the snow", "a drawing of a car", "a photo of a cake in a kitchen")
ACROSS = 2
"""Concepts side by side."""
WAYS = ("added", "calibrated", "refined")


def sheet(base: Base, concepts: Sequence[Concept], seed: int, steps: int) -> Image.Image:
    """Each concept's prompt drawn in four ways, then prompts without a concept."""
    prompts = [
        f"a photo of {concept.meta.tokens[0].token} {PLACES[k % len(PLACES)]}"
        for k, concept in enumerate(concepts)
    ]
    drawn = [_alone(base, concepts, prompts, seed)]
    pairs = [(concept, 1.0) for concept in concepts]
    refined = partial(Calibrated, config=CalibrateConfig(refine=steps))
    for way in (Merged, Calibrated, refined):
        model = way(base, pairs)
        drawn.append(draw(base, [*prompts, *WITHOUT], [seed] * (len(prompts) + len(WITHOUT))))
        model.restore()
    rows = list(zip(*drawn, strict=True))
    page = Sheet(columns=(1 + len(WAYS)) * ACROSS)
    _add(page, prompts, rows[: len(prompts)], "alone")
    _add(page, WITHOUT, rows[len(prompts) :], "the base")
    return page.image()


def _alone(
    base: Base, concepts: Sequence[Concept], prompts: Sequence[str], seed: int
) -> list[Image.Image]:
    """Each prompt with its own concept; those without one by the base."""
    model, pictures = Merged(base), []
    for concept, prompt in zip(concepts, prompts, strict=True):
        model.switch([(concept, 1.0)])
        pictures += draw(base, [prompt], [seed])
    model.restore()
    return [*pictures, *draw(base, list(WITHOUT), [seed] * len(WITHOUT))]


def _add(
    page: Sheet, prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]], first: str
) -> None:
    """Rows of pictures below their prompts; `first` says what the first of each is."""
    for start in range(0, len(prompts), ACROSS):
        some = slice(start, start + ACROSS)
        page.heading(*[*prompts[some], *[""] * ACROSS][:ACROSS])
        labels = first, *WAYS
        page.row([tile for row in rows[some] for tile in zip(row, labels, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concepts", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("calibrated.jpg"))
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--device", default=None)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the refinement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    concepts = [read_concept(path) for path in args.concepts]
    page = sheet(load_base(args.base, args.device), concepts, args.seed, args.steps)
    page.save(args.output, quality=88)


if __name__ == "__main__":
    quiet_libraries()
    main()
