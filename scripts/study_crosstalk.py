"""What keeps concepts in one model from disturbing each other, and what it costs each alone.

    python scripts/render_concepts.py                              # the subjects' pictures
    python scripts/study_crosstalk.py run --device cuda --part 1 --parts 12
    python scripts/study_crosstalk.py report

`run` trains all subjects of one recipe and seed at once, each in a slot of its own; draws every
prompt with each concept alone and with all of them in one model, merged in every way of the plan;
draws prompts without a concept, too; and judges the pictures. It writes one file a recipe and seed.
`report` joins them to results/crosstalk.json and fills in the tables of docs/crosstalk.md.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from crosstalk_study.measures import NOISE, Measures, measures_of
from crosstalk_study.page import tables
from crosstalk_study.plan import MERGES, RECIPES, SEEDS, SUBJECTS, Merge, Recipe
from crosstalk_study.remedies import Remedied
from crosstalk_study.rows import CLASS_WORD, record_of
from merging_study.plan import part_of
from study_options import FIGURES, command, study_parser, with_tables
from study_training import finished, lessons_of

from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig, generic_moments
from sbora_diffusion.records import run_of


def train(
    base: Base, subjects: Sequence[Subject], recipe: Recipe, config: TrainConfig
) -> list[Concept]:
    """A concept of each subject, all trained in one batch."""
    needed = recipe.white is not None or recipe.quiet
    generic = generic_moments(base, CalibrateConfig(), lambda _: None) if needed else {}
    return finished(Remedied(base, lessons_of(base, subjects, config), recipe, generic))


def run(args: argparse.Namespace) -> None:
    measures = measures_of(args)
    base, subjects = measures.base, measures.subjects
    args.files.mkdir(parents=True, exist_ok=True)
    if args.part == 1:
        began = time.monotonic()
        _write(args, CLASS_WORD, {**_bare(measures), "run": _run(args, began)})
    for name, seed in part_of(list(product(args.recipes, args.seeds)), args.part, args.parts):
        began = time.monotonic()
        recipe = RECIPES[name]
        config = TrainConfig(**{**recipe.changes, **args.settings, "seed": seed})
        concepts = train(base, subjects, recipe, config)
        seconds = round(time.monotonic() - began, 1)
        found = {"recipe": name, "seed": seed, "training_seconds": seconds}
        found |= {"alone": measures.alone(concepts), **_in_one_model(args, measures, concepts)}
        _write(args, f"{name} {seed}", {**found, "run": _run(args, began)})


def _bare(measures: Measures) -> dict[str, Any]:
    """What the base does by itself: class words, and what a little noise changes."""
    plain, noisy = measures.unrelated(), measures.unrelated(NOISE)
    return {
        "alone": measures.of_class_words(),
        "noise": measures.distance(noisy, plain),
        "text_of_unrelated": measures.text_of_unrelated(plain),
    }


def _in_one_model(
    args: argparse.Namespace, measures: Measures, concepts: Sequence[Concept]
) -> dict[str, Any]:
    """Way of merging → figures with all concepts in the model."""
    plain, found = measures.unrelated(), {}
    for name in args.merges:
        began = time.monotonic()
        model = merged(measures.base, concepts, MERGES[name])
        seconds = time.monotonic() - began
        pictures = measures.unrelated()
        found[name] = {
            "seconds": round(seconds, 2),
            "each": measures.merged(),
            "distance": measures.distance(pictures, plain),
            "text_of_unrelated": measures.text_of_unrelated(pictures),
        }
        model.restore()
    return {"merged": found}


def merged(base: Base, concepts: Sequence[Concept], how: Merge) -> Merged:
    """All concepts in the base; `restore` gives it back."""
    weight = 1 / len(concepts) if how.weight is None else how.weight
    pairs = [(concept, weight) for concept in concepts]
    if how.calibration is None:
        return Merged(base, pairs)
    return Calibrated(base, pairs, CalibrateConfig.model_validate(how.calibration))


def _write(args: argparse.Namespace, name: str, found: Mapping[str, Any]) -> None:
    (args.files / f"{name.replace(' ', '_')}.json").write_text(json.dumps(found))
    print(name, flush=True)


def _run(args: argparse.Namespace, began: float) -> dict[str, Any]:
    return run_of(command(), args.device, time.monotonic() - began, args.commit)


def report(args: argparse.Namespace) -> None:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(args.files.glob("*.json"))}
    bound = files.pop(CLASS_WORD.replace(" ", "_"))
    record = record_of(bound, list(files.values()))
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    found = tables(record)
    if args.merges_as:
        found = {args.merges_as: found["merges"]}
    page = with_tables(args.page.read_text(encoding="utf-8"), found)
    args.page.write_text(page, encoding="utf-8")
    for row in record["recipes"]:
        print(_line(row), flush=True)


def _line(row: Mapping[str, Any]) -> str:
    alone = " ".join(f"{row['alone'][k]['value']:.3f}" for k in FIGURES)
    ways = [
        f"{way} " + " ".join(f"{found['change'][k]['value']:+.3f}" for k in FIGURES)
        for way, found in row["merged"].items()
    ]
    return f"{row['recipe']:38} {alone} | " + " | ".join(ways)


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "crosstalk", Path("build/concepts"), SUBJECTS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--merges", nargs="+", default=list(MERGES), choices=list(MERGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--num", type=int, default=2, help="pictures for each prompt")
    parser.add_argument("--page", type=Path, default=Path("docs/crosstalk.md"))
    parser.add_argument(
        "--merges-as", metavar="TABLE", help="of the page; nothing but the ways of merging"
    )
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
