"""How many concepts does one model bear? SBoRA, LoRA and Orthogonal Adaptation.

    python scripts/render_concepts.py                              # the subjects' pictures
    python scripts/study_number.py run --device cuda --part 1 --parts 10
    python scripts/study_number.py report

`run` trains all subjects with one method and seed, draws every prompt with each concept alone and
with the first 1, 2, 4 … of them in one model, and judges the pictures. It writes one file a
training and seed. `report` needs all of them and writes results/number.json and docs/number.png.
"""

import argparse
import gc
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from crosstalk_study.measures import measures_of
from merging_study.plan import part_of
from number_study.measures import Divisible, Trained, alone, curve
from number_study.plan import (
    COUNTS,
    PEER_RATES,
    RANK,
    SEEDS,
    SUBJECTS,
    WINNER,
    Kind,
    Training,
    trainings,
)
from number_study.plots import number_picture
from number_study.report import CLASS_WORD, line, record_of
from study_options import command, study_parser

from sbora_diffusion.bench.picture import png_bytes
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.diffusion.baselines.low_rank import Down, LowRankTraining
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.records import run_of

BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def run(args: argparse.Namespace) -> None:
    if max(args.counts) > len(args.subjects):
        raise SystemExit(f"{max(args.counts)} concepts of {len(args.subjects)} subjects")
    measures = measures_of(args, Divisible)
    args.files.mkdir(parents=True, exist_ok=True)
    if args.part == 1:
        began = time.monotonic()
        _write(args, CLASS_WORD, began, {"alone": measures.of_class_words()})
    plan = trainings(args.winner, args.calibration, args.peers)
    for name, seed in part_of(list(product(args.trainings, args.seeds)), args.part, args.parts):
        began = time.monotonic()
        _write(args, f"{name} {seed}", began, _found(args, measures, name, plan[name], seed))


def _found(
    args: argparse.Namespace, measures: Divisible, name: str, training: Training, seed: int
) -> dict[str, Any]:
    """All figures of one training and seed."""
    began = time.monotonic()
    config = TrainConfig(**{**training.changes, **args.settings, "rank": RANK, "seed": seed})
    trained = train(measures.base, measures.subjects, training.kind, config, args.at_once)
    seconds = round(time.monotonic() - began, 1)
    say(f"{name} {seed}: trained")
    return {
        "training": name,
        "about": training.about,
        "config": config.model_dump(mode="json"),
        "merges": {method: vars(how) for method, how in training.merges.items()},
        "seed": seed,
        "training_seconds": seconds,
        "alone": alone(measures, trained),
        "merged": {
            method: curve(
                measures, trained, how, args.counts, lambda text, m=method: say(f"{m}: {text}")
            )
            for method, how in training.merges.items()
        },
    }


def train(
    base: Base, subjects: Sequence[Subject], kind: Kind, config: TrainConfig, at_once: int
) -> Trained:
    """A concept of each subject, so many in one batch."""
    found: list[Any] = []
    for first in range(0, len(subjects), at_once):
        some = enumerate(subjects[first : first + at_once], first)
        lessons = [Lesson(base, subject, config, slot * config.rank) for slot, subject in some]
        found += _trained(base, lessons, kind)
        gc.collect()  # processes share the device, and a recorded step keeps its memory till then
        torch.cuda.empty_cache()
    return found


def _trained(base: Base, lessons: Sequence[Lesson], kind: Kind) -> Trained:
    if kind == "sbora":
        training = GroupTraining(base, lessons)
    else:
        down: Down = "basis" if kind == "orthogonal" else "trained"
        training = LowRankTraining(base, lessons, kind, down=down)
    try:
        for _ in training.steps():
            pass
        if isinstance(training, LowRankTraining):
            return training.adapted()
        return training.concepts()
    finally:
        training.close()


def _write(args: argparse.Namespace, name: str, began: float, found: Mapping[str, Any]) -> None:
    run = run_of(command(), args.device, time.monotonic() - began, args.commit)
    file = args.files / f"{name.replace(' ', '_')}.json"
    file.write_text(json.dumps({**found, "run": run}))
    say(name)


def report(args: argparse.Namespace) -> None:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(args.files.glob("*.json"))}
    bound = files.pop(CLASS_WORD.replace(" ", "_"))
    record = record_of(bound, list(files.values()))
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.picture.write_bytes(png_bytes(number_picture(record)))
    for method in record["methods"]:
        print(line(method), flush=True)


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "number", Path("build/concepts"), SUBJECTS)
    names = list(trainings({}, {}, {}))
    parser.add_argument("--trainings", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="of concepts")
    parser.add_argument("--num", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--at-once", type=int, default=20, help="concepts in one training's batch")
    parser.add_argument("--winner", type=json.loads, default=WINNER, help="JSON, its recipe")
    parser.add_argument("--calibration", type=json.loads, default={}, help="JSON, the winner's")
    parser.add_argument("--peers", type=json.loads, default=PEER_RATES, help="JSON, their recipe")
    parser.add_argument("--picture", type=Path, default=Path("docs/number.png"))
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
