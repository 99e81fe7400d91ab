"""Does a bf16 base cost a concept anything when it trains in the folded form?

    python scripts/study_folding.py run --device cuda --part 1 --parts 12
    python scripts/study_folding.py report

In bf16 a factor's first increments are smaller than half a unit in the last place of the weight
that they live in, and the forward pass sees them only once they have grown. `run` trains every
concept with every seed in both forms, draws with each in fp32 and judges the pictures; it writes
one file a part. `report` needs all of them and writes results/folding.json.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from merging_study.plan import part_of
from recipe_study.plan import PLAIN
from study_options import FIGURES, command, study_parser

from sbora_diffusion.alignment import Judges, load_judges, score
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.tuner.folded_training import FoldedTraining
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import decode
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.diffusion.training_loop import StepRecord, TrainingLoop
from sbora_diffusion.evaluate import PROMPTS, read_pictures
from sbora_diffusion.evaluation.features import LOCAL
from sbora_diffusion.records import at_most, run_of

WHAT = "alignment of concepts trained on a bf16 base, in the folded form and in two paths"
CONCEPTS = Path(__file__).parents[1] / "concepts"
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}
"""Seeds → the 97.5 % quantile of Student's t with one degree of freedom less."""


class TwoPaths(ConceptTraining):
    """The same training with the factor beside the weight, which stays the base's."""

    def steps(self) -> Iterator[StepRecord]:
        self.folded = FoldedTraining({}, {})
        yield from TrainingLoop.steps(self)


FORMS = {"folded": ConceptTraining, "two paths": TwoPaths}


def train(base: Base, form: str, subject: Subject, config: TrainConfig) -> tuple[Concept, str]:
    """The concept, and how many layers were folded."""
    training = FORMS[form](base, subject, config, 0)
    try:
        for _ in training.steps():
            pass
        return training.concept(), f"{len(training.folded.layers)} of {len(training.layers)}"
    finally:
        training.close()


def judged(
    base: Base, judges: Judges, subject: Subject, concept: Concept, args: argparse.Namespace
) -> dict[str, float]:
    """Means over one picture of each prompt."""
    settings = subject.settings
    prompts = [prompt.format(settings.token) for prompt in PROMPTS]
    sampler = MixedSampler(lambda _: [(concept, 1.0)])
    latents = sampler(base, prompts, [args.seed] * len(prompts), args.steps, args.guidance, "")
    texts = [prompt.format(with_article(settings.class_noun)) for prompt in PROMPTS]
    references = judges.features(read_pictures(subject.images[0].parent))
    means = score(judges, decode(base, latents), texts, references).means()
    return {"text_alignment": means["text_alignment"], **means["image_alignment"]}


def run(args: argparse.Namespace) -> None:
    began, judge = time.monotonic(), args.judge
    judges = load_judges(f"{LOCAL}{judge}" if Path(judge).is_dir() else judge, args.device)
    low, full = (load_base(args.base, args.device, dtype) for dtype in ("bf16", "fp32"))
    trainings = list(product(args.subjects, args.seeds, FORMS))
    rows = []
    for name, seed, form in part_of(trainings, args.part, args.parts):
        subject = read_subject(args.concepts / name)
        concept, folded = train(
            low, form, subject, TrainConfig(**{**PLAIN, **args.settings, "seed": seed})
        )
        figures = judged(full, judges, subject, concept, args)
        rows.append({"concept": name, "seed": seed, "form": form, "folded": folded, **figures})
        print(f"{name} {form}, seed {seed}", flush=True)
    done = run_of(command(), args.device, time.monotonic() - began, args.commit)
    args.files.mkdir(parents=True, exist_ok=True)
    (args.files / f"{args.part}.json").write_text(json.dumps({"run": done, "rows": rows}))


def report(args: argparse.Namespace) -> None:
    parts = [json.loads(path.read_text()) for path in sorted(args.files.glob("*.json"))]
    rows = [row for part in parts for row in part["rows"]]
    runs = [part["run"] for part in parts]
    record = {
        "what": WHAT,
        **{key: runs[0][key] for key in ("date", "commit", "device", "versions")},
        "concepts": sorted({row["concept"] for row in rows}),
        "seeds": sorted({row["seed"] for row in rows}),
        "folded_layers": sorted({r["folded"] for r in rows if r["form"] == "folded"}),
        "figures": {figure: _compared(rows, figure) for figure in FIGURES},
        "runs": runs,
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for figure, found in record["figures"].items():
        print(figure, json.dumps(found), flush=True)


def _compared(rows: list[dict[str, Any]], figure: str) -> dict[str, Any]:
    """The mean over the concepts with each seed, and whether the folded form's mean over the seeds
    lies where 95 % of such means of the two-path form would (Student's prediction interval)."""
    by_seed = {form: _means(rows, form, figure) for form in FORMS}
    folded, two = (list(by_seed[form].values()) for form in FORMS)
    reach = STUDENT[len(two)] * stdev(two) * (1 / len(two) + 1 / len(folded)) ** 0.5
    difference = mean(folded) - mean(two)
    return {
        "by_seed": {f: {s: round(v, 4) for s, v in found.items()} for f, found in by_seed.items()},
        "folded_minus_two_paths": round(difference, 4),
        "difference": at_most(abs(difference), round(reach, 4)),
    }


def _means(rows: list[dict[str, Any]], form: str, figure: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["form"] == form:
            found.setdefault(row["seed"], []).append(row[figure])
    return {seed: mean(values) for seed, values in sorted(found.items())}


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "folding", CONCEPTS, _all_subjects())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    return parser.parse_args()


def _all_subjects() -> list[str]:
    return sorted(path.parent.name for path in CONCEPTS.glob("*/concept.toml"))


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
