"""How well does `sbora check` predict what a merge loses?

    python scripts/render_concepts.py                              # the subjects' pictures
    python scripts/study_prediction.py run --device cuda --part 1 --parts 6
    python scripts/study_prediction.py report

`run` trains all subjects at once (or reads their concept files), predicts random sets of them from
second moments, merges each set calibrated and plainly, draws, and judges the pictures. Each part
takes its share of the sets and writes one file. `report` needs all of them, writes
results/prediction.json, and says what `LOSSES` in sbora_diffusion/prediction_report.py is to be.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosstalk_study.measures import measures_of
from crosstalk_study.plan import SUBJECTS
from merging_study.plan import part_of
from number_study.measures import Divisible
from prediction_study.measuring import Merges
from prediction_study.plan import RULE_SEED, SETS, drawn_sets
from prediction_study.report import line, record_of
from study_options import command, study_parser
from study_training import train

from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.records import run_of

BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def run(args: argparse.Namespace) -> None:
    measures = measures_of(args, Divisible)
    calibration = CalibrateConfig.model_validate(args.calibration)
    training, concepts = _concepts(args, measures.base, measures.subjects)
    say(f"{len(concepts)} concepts are there")
    alone = measures.alone(concepts)
    merges, sets = Merges(measures, concepts, calibration), []
    say("judged alone")
    plan = drawn_sets([concept.meta.name for concept in concepts], args.sets, args.rule_seed)
    for number in part_of(range(len(plan)), args.part, args.parts):
        sets.append({"number": number, **merges.of(plan[number])})
        say(f"{number}: {', '.join(plan[number])}")
    found = {
        "training": training,
        "calibration": calibration.model_dump(mode="json"),
        "rule_seed": args.rule_seed,
        "alone": alone,
        "sets": sets,
        "run": run_of(command(), args.device, time.monotonic() - BEGAN, args.commit),
    }
    args.files.mkdir(parents=True, exist_ok=True)
    file = args.files / f"part_{args.part}_of_{args.parts}.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    say(str(file))


def _concepts(
    args: argparse.Namespace, base: Base, subjects: Sequence[Subject]
) -> tuple[dict[str, Any] | None, list[Concept]]:
    """How they were trained here, if they were, and the concepts."""
    if args.concept_files:
        names = [subject.settings.name for subject in subjects]
        files = [args.concept_files / f"{name}.safetensors" for name in names]
        return None, [read_concept(file) for file in files]
    config = TrainConfig(**args.settings)
    return config.model_dump(mode="json"), train(base, subjects, config)


def report(args: argparse.Namespace) -> None:
    parts = [json.loads(path.read_text()) for path in sorted(args.files.glob("part_*.json"))]
    if not parts:
        raise SystemExit(f"no parts in {args.files}: run them first")
    record = record_of(parts)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for way, found in record["ways"].items():
        print(line(way, found), flush=True)


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "prediction", Path("build/concepts"), SUBJECTS)
    parser.add_argument(
        "--concept-files", type=Path, help="folder of NAME.safetensors; no training"
    )
    parser.add_argument("--calibration", type=json.loads, default={}, help="JSON, of the merges")
    parser.add_argument("--sets", type=int, default=SETS)
    parser.add_argument("--rule-seed", type=int, default=RULE_SEED, help="of the sets")
    parser.add_argument("--num", type=int, default=1, help="pictures for each prompt")
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
