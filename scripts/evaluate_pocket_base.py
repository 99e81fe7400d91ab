"""Measure the embedded base and its judge, and write results/pocket_base.json with a sheet.

    python scripts/evaluate_pocket_base.py --only speed
    python scripts/evaluate_pocket_base.py --only judge base --device cuda --batch 250
    python scripts/evaluate_pocket_base.py --only concepts --concept bulldog siamese

Sections that were not asked for stay in the record as they are. With --concept only these
concepts are trained and drawn, into --concept-files and --pictures, and no record is written:
several processes can share the work before one without --concept judges all of them.
"""

import argparse
import json
import shlex
import sys
import time
from functools import cached_property
from pathlib import Path

import torch
from pocket_evaluation.base_section import judge_base
from pocket_evaluation.ceiling_section import ceiling_figures
from pocket_evaluation.concepts_section import ConceptRun, concepts_figures
from pocket_evaluation.drawing import Drawer
from pocket_evaluation.judge_section import judge_the_judge, read_subjects
from pocket_evaluation.record import write_section
from pocket_evaluation.scenes import World
from pocket_evaluation.sheet import base_sheet
from pocket_evaluation.speed_section import measure_speed

from sbora_diffusion.alignment import Judges, load_judges
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS
from sbora_diffusion.evaluate import PROMPTS, EvaluateConfig
from sbora_diffusion.evaluation.features import LOCAL
from sbora_diffusion.records import run_of

SECTIONS = ("judge", "base", "speed", "concepts", "ceiling")


class Evaluator:
    """The sections, each returning its figures; what they share is loaded when it is needed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.began = time.monotonic()

    @cached_property
    def model(self) -> Base:
        return load_base(self.args.base, self.args.device)

    @cached_property
    def judges(self) -> Judges:
        judge = self.args.judge
        return load_judges(f"{LOCAL}{judge}" if Path(judge).is_dir() else judge, self.args.device)

    @cached_property
    def world(self) -> World:
        return World(self.args.world, self.args.seed, torch.device(self.args.device))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def judge(self) -> dict:
        args = self.args
        return judge_the_judge(self.world, self.judges.clip, args.concepts, args.seed, args.groups)

    def base(self) -> dict:
        args = self.args
        drawer = Drawer(
            self.model, args.steps, args.guidance, args.batch, args.seed, self.pictures,
            args.from_pictures is not None,
        )  # fmt: skip
        figures, judged = judge_base(self.world, drawer, self.judges.clip, args.number, self.say)
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        base_sheet(judged).save(args.sheet, quality=75)
        return figures

    def speed(self) -> dict:
        args = self.args
        model = self.model if args.device == "cpu" else load_base(args.base, "cpu")
        return measure_speed(model, read_subjects(args.concepts)[0])

    def concepts(self) -> dict | None:
        args = self.args
        subjects = read_subjects(args.concepts)
        names = [subject.settings.name for subject in subjects]
        if unknown := set(args.concept) - set(names):
            raise SystemExit(f"no concept {sorted(unknown)} in {args.concepts}")
        config = EvaluateConfig(
            num=args.per_prompt, seed=args.seed, steps=args.steps, guidance=args.guidance
        )
        run = ConceptRun(args.concept_files, self.judges, config, self.pictures,
                         args.from_pictures is not None)  # fmt: skip
        each = {}
        for slot, (name, subject) in enumerate(zip(names, subjects, strict=True)):
            if not args.concept or name in args.concept:
                each[name] = run.judge(lambda: self.model, subject, slot, self.say)
                self.say(f"{name}: {each[name]['difference']}")
        return None if args.concept else concepts_figures(each, run)

    def ceiling(self) -> dict:
        args = self.args
        measured = json.loads(args.out.read_text()) if args.out.exists() else {}
        if "concepts" not in measured:
            raise SystemExit(f"{args.out} has no section 'concepts': measure it first")
        subjects = read_subjects(args.concepts)
        return ceiling_figures(
            self.world, self.model, self.judges, subjects, measured["concepts"], args.seed,
            args.per_prompt * len(PROMPTS), self.say,
        )  # fmt: skip

    @property
    def pictures(self) -> Path | None:
        return self.args.from_pictures or self.args.pictures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--base", default="pocket", help="model folder in diffusers layout")
    parser.add_argument("--judge", default="pocket-clip", help="model folder of open_clip")
    parser.add_argument("--world", type=Path, default=Path("build/world"))
    parser.add_argument("--concepts", type=Path, default=Path("concepts"))
    parser.add_argument("--number", type=int, default=500, help="prompts of each set")
    parser.add_argument("--groups", type=int, default=20, help="of 100 captions, for the judge")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once")
    parser.add_argument("--seed", type=int, default=20_000_000, help="of no training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--concept", nargs="+", default=[], help="train and draw only these")
    parser.add_argument("--concept-files", type=Path, default=Path("build/pocket_concepts"))
    parser.add_argument("--per-prompt", type=int, default=2, help="pictures, for concepts")
    parser.add_argument("--pictures", type=Path, help="folder that keeps what was drawn")
    parser.add_argument("--from-pictures", type=Path, help="such a folder, judged without drawing")
    parser.add_argument("--out", type=Path, default=Path("results/pocket_base.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/pocket_base.jpg"))
    parser.add_argument("--commit", help="of the code, where there is no git checkout")
    return parser.parse_args()


def main() -> None:
    args = parse()
    quiet_libraries()
    command = shlex.join(["python", "scripts/evaluate_pocket_base.py", *sys.argv[1:]])
    evaluator = Evaluator(args)
    for section in args.only:
        began = time.monotonic()
        figures = getattr(evaluator, section)()
        device = "cpu" if section == "speed" else args.device
        if figures is not None:
            run = run_of(command, device, time.monotonic() - began, args.commit)
            write_section(args.out, section, figures, run)
        evaluator.say(f"{section} took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
