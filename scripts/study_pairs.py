"""Two concepts in one picture: train, draw all pairs in four conditions, judge the regions.

    python scripts/study_pairs.py train --method sbora --files build/pairs/files
    python scripts/study_pairs.py tune --rates 3e-4 1e-3 3e-3 --concept trex bluevase
    python scripts/study_pairs.py train --method lora --rates 1e-3 --files build/pairs/files
    python scripts/study_pairs.py draw --condition sbora-regions lora --part 0 --parts 2
    python scripts/study_pairs.py judge --out results/pairs.json --sheet build/pairs.jpg

Work of train, tune and draw is shared by processes with --part and --parts.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from pair_study.drawing import PairDrawer
from pair_study.plan import CONDITIONS, METHODS, all_pairs, part_of
from pair_study.report import PairJudge, judge_all, record
from pair_study.sheet import pair_sheet
from pair_study.training import Recipe, lora_config
from pair_study.tuning import Bench, keep, label, table
from pocket_evaluation.judge_section import read_subjects

from sbora_diffusion.alignment import Judges, load_judges
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.diffusion.bases import load_base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import DrawConfig, TrainConfig
from sbora_diffusion.diffusion.pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS
from sbora_diffusion.evaluation.features import LOCAL
from sbora_diffusion.records import run_of

WHAT = (
    "two concepts in one picture: how often a region looks more like its own concept than like "
    "the other one"
)
LORA_RANK, LORA_RATE = 4, 1e-3
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def train(args: argparse.Namespace) -> None:
    made = recipe(args, args.method)
    base = load_base(args.base, args.device)
    for name in part_of(names_of(args, made.subjects), args.part, args.parts):
        made.train(base, name, args.files, say)
    say("trained")


def tune(args: argparse.Namespace) -> None:
    subjects = {s.settings.name: s for s in read_subjects(args.concepts)}
    names = names_of(args, list(subjects.values()))
    configs = [lora_config(args.rank, *rates(text), args.train_steps) for text in args.rates]
    jobs = [(name, config) for name in names for config in configs]
    jobs += [(name, None) for name in names if args.with_sbora]
    bench = Bench(
        load_base(args.base, args.device),
        judges(args),
        DrawConfig(num=args.per_prompt, steps=args.steps, guidance=args.guidance),
    )
    for name, config in jobs[args.part :: args.parts]:  # costly and cheap ones in every part
        if config:
            keep(args.out, name, label(config), config, bench.lora(subjects[name], config))
        else:
            made = recipe(args, "sbora")
            found = bench.sbora(subjects[name], made.read(args.files, name))
            keep(args.out, name, "sbora", made.config, found)
        say(f"{name} {label(config) if config else 'sbora'}")
    print(json.dumps(table(args.out), indent=1))


def draw(args: argparse.Namespace) -> None:
    base = load_base(args.base, args.device)
    subjects = read_subjects(args.concepts)
    pairs = all_pairs([subject.settings.name for subject in subjects])
    chosen = names_of(args, subjects)
    wanted = [pair for pair in pairs if set(pair) <= set(chosen)]
    for condition in args.condition:
        method, _, regions = condition.partition("-")
        drawer = PairDrawer(
            base, recipe(args, method), args.files, bool(regions), pairs, args.steps, args.guidance
        )
        for pair in part_of(wanted, args.part, args.parts):
            drawer.keep(pair, args.out)
        drawer.attach([])
        say(f"{condition} drawn")


def judge(args: argparse.Namespace) -> None:
    judge = PairJudge(judges(args), read_subjects(args.concepts), args.seed)
    judged = judge_all(judge, args.pictures)
    found = record(judge, judged)
    tuned = {"learning_rates": table(args.tuning)} if args.tuning else {}
    command = shlex.join(["python", "scripts/study_pairs.py", *sys.argv[1:]])
    run = run_of(command, args.device, time.monotonic() - BEGAN, args.commit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"what": WHAT, **run, **found, **tuned}, indent=1, ensure_ascii=False)
    args.out.write_text(text + "\n", encoding="utf-8")
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    pair_sheet(judge, judged).save(args.sheet, quality=85)
    for name, conditions in found["conditions"].items():
        for condition, figures in conditions.items():
            say(f"{name} {condition}: {figures['own_concept_scores_higher']}")


def recipe(args: argparse.Namespace, method: str) -> Recipe:
    """What the options say of one method; SBoRA has its default settings."""
    config = TrainConfig()
    if args.train_steps:
        config = config.model_copy(update={"steps": args.train_steps})
    if method == "lora":
        if len(args.rates) != 1:
            raise SystemExit("give one value of --rates")
        config = lora_config(args.rank, *rates(args.rates[0]), args.train_steps)
    return Recipe(method, config, read_subjects(args.concepts))


def rates(text: str) -> tuple[float, float | None]:
    """ "1e-3" → UNet alone, "1e-3:2e-4" → UNet and text encoder."""
    unet, _, text_encoder = text.partition(":")
    return float(unet), float(text_encoder) if text_encoder else None


def names_of(args: argparse.Namespace, subjects: list[Subject]) -> list[str]:
    known = [subject.settings.name for subject in subjects]
    if unknown := set(args.concept) - set(known):
        raise SystemExit(f"no concept {sorted(unknown)} in {args.concepts}")
    return [name for name in known if not args.concept or name in args.concept]


def judges(args: argparse.Namespace) -> Judges:
    return load_judges(
        f"{LOCAL}{args.judge}" if Path(args.judge).is_dir() else args.judge, args.device
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--base", default="pocket", help="model folder in diffusers layout")
    shared.add_argument("--concepts", type=Path, default=Path("concepts"))
    shared.add_argument("--concept", nargs="+", default=[], help="these only")
    shared.add_argument("--device", default="cpu")
    judging = argparse.ArgumentParser(add_help=False)
    judging.add_argument("--judge", default="pocket-clip", help="model folder of open_clip")
    working = argparse.ArgumentParser(add_help=False)
    working.add_argument("--files", type=Path, default=Path("build/pairs/files"))
    working.add_argument("--rank", type=int, default=LORA_RANK, help="of LoRA")
    working.add_argument(
        "--rates", nargs="+", default=[f"{LORA_RATE:g}"], metavar="UNET[:TEXT]",
        help="learning rates of LoRA; the text encoder's is a sixth of the UNet's by default",
    )  # fmt: skip
    working.add_argument("--train-steps", type=int, help="the recipe's by default")
    working.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of a picture")
    working.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    working.add_argument("--part", type=int, default=0, help="0 … parts − 1")
    working.add_argument("--parts", type=int, default=1)

    training = commands.add_parser("train", parents=[shared, working])
    training.add_argument("--method", choices=METHODS, required=True)
    tuning = commands.add_parser("tune", parents=[shared, working, judging])
    tuning.add_argument("--per-prompt", type=int, default=2, help="pictures")
    tuning.add_argument("--with-sbora", action="store_true", help="score --files of SBoRA too")
    tuning.add_argument("--out", type=Path, default=Path("build/pairs/tuning"))
    drawing = commands.add_parser("draw", parents=[shared, working])
    drawing.add_argument("--condition", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    drawing.add_argument("--out", type=Path, default=Path("build/pairs/pictures"))
    report = commands.add_parser("judge", parents=[shared, judging])
    report.add_argument("--pictures", type=Path, default=Path("build/pairs/pictures"))
    report.add_argument("--tuning", type=Path, help="folder of `tune`, for the record")
    report.add_argument("--seed", type=int, default=0, help="of calibration and resampling")
    report.add_argument("--out", type=Path, default=Path("results/pairs.json"))
    report.add_argument("--sheet", type=Path, default=Path("build/pairs.jpg"))
    report.add_argument("--commit", help="of the code, where there is no git checkout")
    return parser.parse_args()


def main() -> None:
    args = parse()
    quiet_libraries()
    {"train": train, "tune": tune, "draw": draw, "judge": judge}[args.command](args)


if __name__ == "__main__":
    main()
