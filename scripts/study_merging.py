"""What merging three and fourteen concepts costs, against each alone and against routing.

    python scripts/study_merging.py draw --files FOLDER --device cuda --out PICTURES \
        --part 1 --parts 3
    python scripts/study_merging.py judge --files FOLDER --pictures PICTURES

`draw` writes one .tar a part; `judge` needs all parts, and works on the CPU.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from merging_study.archive import SHARED, Archive, read_archives
from merging_study.drawing import MergingRun
from merging_study.judging import (
    crosstalk_figures,
    figures,
    merge_seconds,
    score_all,
    unrelated_figures,
)
from merging_study.plan import UNRELATED_PROMPTS, part_of, threes
from merging_study.sheet import merging_sheet

from sbora_diffusion.alignment import load_judges
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.evaluate import PROMPTS, EvaluateConfig, read_pictures
from sbora_diffusion.evaluation.features import LOCAL
from sbora_diffusion.records import run_of

WHAT = "text and image alignment of concepts merged by 3 and all together, alone, and routed"
QUALITY = 75


def say(text: str) -> None:
    print(text, flush=True)


def read_files(folder: Path) -> dict[str, Concept]:
    """The concepts of a folder by name."""
    concepts = [read_concept(path) for path in sorted(folder.glob("*.safetensors"))]
    return {concept.meta.name: concept for concept in concepts}


def draw(args: argparse.Namespace) -> None:
    began = time.monotonic()
    base, concepts = load_base(args.base, args.device), read_files(args.files)
    folders = {name: read_subject(args.concepts / name).settings for name in concepts}
    sets = threes({name: settings.category for name, settings in folders.items()}, args.rule_seed)
    config = EvaluateConfig(num=args.num, seed=args.seed, steps=args.steps, guidance=args.guidance)
    run = MergingRun(base, concepts, sets, config, Archive(shared_facts(base, concepts, config)))
    run.archive.facts["threes"] = [
        {"condition": three.kind, "concepts": list(three.concepts)} for three in sets
    ]
    run.draw(part_of(list(concepts), args.part, args.parts), say)
    if args.part == 1:
        run.draw_unrelated()
    run.close()
    seconds = time.monotonic() - began
    run.archive.facts["run"] = run_of(command(), args.device, seconds, args.commit)
    path = args.out / f"part-{args.part}-of-{args.parts}.tar"
    run.archive.write(path)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s")


def shared_facts(
    base: Base, concepts: dict[str, Concept], config: EvaluateConfig
) -> dict[str, Any]:
    """What is the same in every part."""
    drawing = config.model_dump(include={"num", "seed", "steps", "guidance"})
    return {
        "settings": {
            "base": base.public_name,
            "base_key": base.key,
            **drawing,
            "prompts": list(PROMPTS),
        },
        "concepts": {
            name: {"digest": concept.meta.digest, "class_noun": concept.meta.class_noun}
            for name, concept in concepts.items()
        },
        "unrelated": list(UNRELATED_PROMPTS),
    }


def judge(args: argparse.Namespace) -> None:
    began = time.monotonic()
    archive, concepts = read_archives(args.pictures), read_files(args.files)
    facts = archive.facts
    digests = {name: concept.meta.digest for name, concept in concepts.items()}
    if digests != {name: known["digest"] for name, known in facts["concepts"].items()}:
        raise SystemExit(f"{args.pictures} was drawn with other files than those in {args.files}")
    rms = predicted_crosstalk(args, concepts)
    say(f"crosstalk measured after {time.monotonic() - began:.0f} s")
    judges = load_judges(f"{LOCAL}{args.judge}" if Path(args.judge).is_dir() else args.judge)
    references = {name: read_pictures(args.concepts / name) for name in concepts}
    scored = score_all(archive, references, judges)
    say(f"scored after {time.monotonic() - began:.0f} s")
    record = {
        "routed_equal_single": routing_figures(facts["routing"]),
        **figures(scored),
        "unrelated_prompts": unrelated_figures(archive, judges),
        "crosstalk": crosstalk_figures(scored, list(concepts), rms),
        "merge_seconds": merge_seconds(facts["merge_seconds"]),
        "judge": judges.clip.name,
        **{key: facts[key] for key in SHARED},
    }
    run = run_of(command(), "cpu", time.monotonic() - began, args.commit)
    write_record(args.out, record, [*facts["runs"], run])
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    merging_sheet(archive).save(args.sheet, quality=QUALITY)
    say(json.dumps(record["means"], indent=1))


def predicted_crosstalk(args: argparse.Namespace, concepts: dict[str, Concept]) -> np.ndarray:
    """Crosstalk of `sbora check`, (P, P): [whose prompts][who disturbs]."""
    model = Calibrated(load_base(args.base, "cpu"))
    pairs = [(concept, 1.0) for concept in concepts.values()]
    return model.forecast(pairs, list(concepts)).crosstalk.rms().numpy()


def routing_figures(routing: dict[str, dict[str, int]]) -> dict[str, Any]:
    """How many routed pictures have the latents of the concept alone, bit for bit."""
    equal, of = (sum(found[key] for found in routing.values()) for key in ("equal", "of"))
    return {
        "equal": equal,
        "of": of,
        "different": {k: v for k, v in routing.items() if v["equal"] < v["of"]},
    }


def write_record(path: Path, record: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """The figures with all runs that led to them; the device is that of the drawing."""
    about = {key: runs[0][key] for key in ("commit", "device", "versions")}
    merged = {"what": WHAT, "date": runs[-1]["date"], **about, "runs": runs, **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command() -> str:
    """As it was given, with only the last part of absolute paths."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "scripts/study_merging.py", *words])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    drawing = commands.add_parser("draw", help="draw pictures into .tar files")
    drawing.set_defaults(run=draw)
    drawing.add_argument("--out", type=Path, required=True, help="folder for the .tar files")
    drawing.add_argument("--device", default="cpu")
    drawing.add_argument("--part", type=int, default=1)
    drawing.add_argument("--parts", type=int, default=3, help="processes that share the work")
    drawing.add_argument("--rule-seed", type=int, default=0, help="of the threes")
    for name, field in EvaluateConfig.model_fields.items():
        if name in ("num", "steps", "guidance"):
            drawing.add_argument(f"--{name}", type=type(field.default), default=field.default)
    drawing.add_argument("--seed", type=int, default=20_000_000, help="of no training")
    judging = commands.add_parser("judge", help="judge them, write record and sheet")
    judging.set_defaults(run=judge)
    judging.add_argument("--pictures", type=Path, required=True, help="folder with the .tar files")
    judging.add_argument("--judge", default="pocket-clip", help="model folder of open_clip")
    judging.add_argument("--out", type=Path, default=Path("results/merging_quality.json"))
    judging.add_argument("--sheet", type=Path, default=Path("docs/merging_quality.jpg"))
    for command_parser in (drawing, judging):
        command_parser.add_argument("--files", type=Path, required=True, help="concept files")
        command_parser.add_argument("--base", default="pocket")
        command_parser.add_argument("--concepts", type=Path, default=Path("concepts"))
        command_parser.add_argument("--commit", help="of the code, where there is no checkout")
    return parser.parse_args()


def main() -> None:
    args = parse()
    quiet_libraries()
    args.run(args)


if __name__ == "__main__":
    main()
