"""What crosstalk of concepts in one model is made of: layers, timesteps, rates, means, outliers.

    python scripts/render_concepts.py                              # the subjects' pictures
    python scripts/study_diagnosis.py run --device cuda --part 1 --parts 10
    python scripts/study_diagnosis.py report

`run` trains all subjects of one variant, rate and seed at once, each in a slot of its own, and
measures what there is after some steps of that training: how well each does alone, and what all
others in the same model change in the UNet's prediction for it, in all layers and in each group of
them. It writes one file a training. `report` joins the files to results/diagnosis.json, and draws
its two plots, for which the record is enough.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from crosstalk_study.measures import Measures, measures_of
from crosstalk_study.plan import SUBJECTS
from diagnosis_study.noise import PROMPTS, Crowd, Scenes, crosstalk, scenes
from diagnosis_study.parts import Inputs, parts_by_group
from diagnosis_study.plan import (
    ANALYSED,
    RATES,
    SEEDS,
    SNAPSHOTS,
    TIMESTEPS,
    settings,
)
from diagnosis_study.plots import gain_plot, groups_plot
from diagnosis_study.rows import heading, rows, shown
from merging_study.plan import part_of
from merging_study.statistics import mean_figure
from study_options import command, study_parser
from study_training import lessons_of

from sbora_diffusion.bench.picture import png_bytes
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.functional import VARIANTS
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.records import run_of

WHAT = (
    "gain of concepts alone, and crosstalk of all in one model by group of layers, timestep, "
    "learning rate and steps: what the others change in the UNet's prediction over what the "
    "concept itself does, mean squares"
)
CLASS_WORD = "class_word"


def snapshots(
    base: Base, subjects: Sequence[Subject], config: TrainConfig, at: Sequence[int]
) -> dict[int, list[Concept]]:
    """Steps → a concept of each subject, all trained in one batch."""
    training = GroupTraining(base, lessons_of(base, subjects, config))
    try:
        return {done.step: training.concepts() for done in training.steps() if done.step in set(at)}
    finally:
        training.close()


def run(args: argparse.Namespace) -> None:
    measures = measures_of(args)
    base, subjects = measures.base, measures.subjects
    found = scenes(base, subjects, args.timesteps, args.seed)
    args.files.mkdir(parents=True, exist_ok=True)
    if args.part == 1:
        began, plan = time.monotonic(), {"timesteps": args.timesteps, "prompts": PROMPTS}
        _write(args, CLASS_WORD, {**plan, "alone": measures.of_class_words()}, began)
    for variant, rate, seed in part_of(
        list(product(args.variants, args.rates, args.seeds)), args.part, args.parts
    ):
        began = time.monotonic()
        changes = {**settings(variant, rate, max(args.snapshots)), **args.settings, "seed": seed}
        config = TrainConfig(**changes)
        trained = snapshots(base, subjects, config, args.snapshots)
        seconds = round(time.monotonic() - began, 1)
        about = {"variant": variant, "rate": rate, "seed": seed, "training_seconds": seconds}
        about |= {k: getattr(config, k) for k in ("rate_unet", "rate_text_encoder")}
        looks = {k: look(measures, found, c, k == args.analysed) for k, c in trained.items()}
        about |= {"parameters": parameters(trained[max(trained)][0])}
        _write(args, f"{variant}_{rate:g}_{seed}", {**about, "snapshots": looks}, began)


def parameters(concept: Concept) -> int:
    """Trained numbers in a concept's factors."""
    return sum(layer.factor.numel() for layer in concept.layers.values())


def look(
    measures: Measures, found: Scenes, concepts: Sequence[Concept], inside: bool
) -> dict[str, Any]:
    """All that is measured of one snapshot.

    Args:
        inside: whether layer by layer, too.
    """
    crowd, inputs = Crowd(measures.base, concepts), Inputs(len(concepts))
    squares = crosstalk(crowd, found, inputs if inside else None)
    result = {"alone": measures.alone(concepts), "squares": squares}
    if inside:
        shapes = {name: tuple(crowd.layers[name].weight.shape) for name in crowd.banks}
        result["parts"] = parts_by_group(crowd.banks, shapes, inputs)
    return result


def _write(args: argparse.Namespace, name: str, found: Mapping[str, Any], began: float) -> None:
    about = run_of(command(), args.device, time.monotonic() - began, args.commit)
    (args.files / f"{name}.json").write_text(json.dumps({**found, "run": about}))
    print(f"{name}: {about['seconds']} s", flush=True)


def report(args: argparse.Namespace) -> None:
    """Join the files, if there are any, and draw the record."""
    if paths := sorted(args.files.glob("*.json")):
        files = {path.stem: json.loads(path.read_text()) for path in paths}
        record = joined(files.pop(CLASS_WORD), list(files.values()))
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(args.record.read_text(encoding="utf-8"))
    print(heading(), *map(shown, record["rows"]), sep="\n", flush=True)
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, plot in {"groups": groups_plot, "gain": gain_plot}.items():
        (args.plots / f"diagnosis_{name}.png").write_bytes(png_bytes(plot(record)))


def joined(bound: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record.

    Args:
        bound: the file about the class words.
        files: of all trainings.
    """
    alone = bound["alone"]
    figures = next(iter(alone.values()))
    return {
        "what": WHAT,
        **{key: bound["run"][key] for key in ("date", "commit", "device", "versions")},
        "subjects": list(alone),
        **{key: bound[key] for key in ("prompts", "timesteps")},
        "class_word": {k: mean_figure([e[k] for e in alone.values()]) for k in figures},
        "rows": rows(files, alone),
        "training_seconds": max(found["training_seconds"] for found in files),
        "runs": [bound["run"], *(found["run"] for found in files)],
    }


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "diagnosis", Path("build/concepts"), SUBJECTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="of default's")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--snapshots", nargs="+", type=int, default=list(SNAPSHOTS), help="steps")
    parser.add_argument("--analysed", type=int, default=ANALYSED, help="snapshot, by layers")
    parser.add_argument("--timesteps", nargs="+", type=int, default=list(TIMESTEPS))
    parser.add_argument("--num", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="where plots are put")
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
