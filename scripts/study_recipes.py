"""What each setting of the training recipe is worth: gains over the bare class word.

    python scripts/render_concepts.py                              # the subjects' pictures
    python scripts/study_recipes.py run --device cuda --part 1 --parts 4
    python scripts/study_recipes.py report

`run` trains all subjects of one recipe at once, each in a slot of its own, draws every prompt with
each concept alone and with three of them merged into the model, and judges the pictures; it writes
one file a recipe. `report` needs all of them and writes results/recipes.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from merging_study.plan import MIXED, part_of, threes
from merging_study.statistics import mean_figure
from recipe_study.plan import PLAIN, RECIPES, SUBJECTS
from study_options import FIGURES, command, study_parser
from study_training import train
from torch import Tensor

from sbora_diffusion.alignment import Judges, load_judges, score
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import decode, draw_latents
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluate import CLASS_WORD, PROMPTS, read_pictures
from sbora_diffusion.evaluation.features import LOCAL
from sbora_diffusion.records import run_of

WHAT = "image and text alignment of recipes, minus those of the bare class word, on 16 subjects"
AT_ONCE = 8
"""Subjects whose pictures are drawn in one batch."""


def drawn(
    base: Base, subjects: list[Subject], concepts: list[Concept], args: argparse.Namespace
) -> Iterator[tuple[Subject, Tensor]]:
    """Each subject and the latents of its pictures.

    Args:
        concepts: one for each subject; none draws the bare class nouns.
    """
    by_token = {concept.meta.tokens[0].token: concept for concept in concepts}
    sampler = MixedSampler(
        lambda prompt: [(concept, 1.0) for token, concept in by_token.items() if token in prompt]
    )
    for start in range(0, len(subjects), AT_ONCE):
        some = subjects[start : start + AT_ONCE]
        prompts = [p.format(_word(s, concepts)) for s in some for p in _repeated(args.num)]
        seeds = [args.seed + k for _ in some for _ in PROMPTS for k in range(args.num)]
        draw = sampler if concepts else draw_latents
        latents = draw(base, prompts, seeds, args.steps, args.guidance, "")
        yield from zip(some, latents.split(len(PROMPTS) * args.num), strict=True)


def _repeated(num: int) -> list[str]:
    return [prompt for prompt in PROMPTS for _ in range(num)]


def _word(subject: Subject, concepts: list[Concept]) -> str:
    """What stands in the prompt: the placeholder, or the bare class noun without concepts."""
    settings = subject.settings
    return settings.token if concepts else with_article(settings.class_noun)


def _score(
    base: Base, judges: Judges, subject: Subject, latents: Tensor, num: int
) -> dict[str, float]:
    """Figures of one subject's pictures, `num` for each prompt."""
    references = judges.features(read_pictures(subject.images[0].parent))
    texts = [prompt.format(_word(subject, [])) for prompt in _repeated(num)]
    means = score(judges, decode(base, latents), texts, references).means()
    return {"text_alignment": means["text_alignment"], **means["image_alignment"]}


def judged_in_threes(
    base: Base, judges: Judges, subjects: list[Subject], concepts: list[Concept], args: Any
) -> dict[str, dict[str, float]]:
    """Three concepts joined by "+" → means over their pictures, all three folded into the base."""
    by_name = {s.settings.name: (s, c) for s, c in zip(subjects, concepts, strict=True)}
    categories = {name: subject.settings.category for name, (subject, _) in by_name.items()}
    model, found = Merged(base), {}
    for three in threes(categories, seed=0):
        if three.kind == MIXED:
            some = [by_name[name] for name in three.concepts]
            model.switch([(concept, 1.0) for _, concept in some])
            prompts = [p.format(s.settings.token) for s, _ in some for p in PROMPTS]
            latents = draw_latents(
                base, prompts, [args.seed] * len(prompts), args.steps, args.guidance
            )
            parts = latents.split(len(PROMPTS))
            each = [
                _score(base, judges, s, part, 1) for (s, _), part in zip(some, parts, strict=True)
            ]
            found[three.label] = {k: sum(e[k] for e in each) / len(each) for k in FIGURES}
    model.switch([])
    return found


def run(args: argparse.Namespace) -> None:
    judge = args.judge
    judges = load_judges(f"{LOCAL}{judge}" if Path(judge).is_dir() else judge, args.device)
    base = load_base(args.base, args.device)
    subjects = [read_subject(args.concepts / name) for name in args.subjects]
    args.files.mkdir(parents=True, exist_ok=True)
    for name in part_of([CLASS_WORD, *args.recipes], args.part, args.parts):
        began, concepts = time.monotonic(), []
        changes = None if name == CLASS_WORD else RECIPES[name] | args.settings
        if changes is not None:
            concepts = train(base, subjects, TrainConfig(**changes))
        trained = time.monotonic()
        each = {
            subject.settings.name: _score(base, judges, subject, latents, args.num)
            for subject, latents in drawn(base, subjects, concepts, args)
        }
        merged = judged_in_threes(base, judges, subjects, concepts, args) if concepts else {}
        found = {
            "recipe": name,
            "changes": changes,
            "each": each,
            "threes": merged,
            "training_seconds": round(trained - began, 1),
            "run": run_of(command(), args.device, time.monotonic() - began, args.commit),
        }
        (args.files / f"{name.replace(' ', '_')}.json").write_text(json.dumps(found))
        print(f"{name}: {found['training_seconds']} s of training", flush=True)


def report(args: argparse.Namespace) -> None:
    found = {f["recipe"]: f for f in map(_read, sorted(args.files.glob("*.json")))}
    bound = found.pop(CLASS_WORD)
    order = sorted(found, key=lambda name: list(RECIPES).index(name))
    runs = {key: bound["run"][key] for key in ("date", "commit", "device", "versions")}
    record = {
        "what": WHAT,
        **runs,
        "default": TrainConfig(**PLAIN).model_dump(mode="json"),
        "subjects": list(bound["each"]),
        "class_word": {k: mean_figure([e[k] for e in bound["each"].values()]) for k in FIGURES},
        "recipes": [
            {
                "recipe": name,
                "changes": found[name]["changes"],
                "gain": {k: mean_figure(_gains(found[name], bound, k)) for k in FIGURES},
                "gain_in_threes": {
                    k: mean_figure(_in_threes(found[name], bound, k)) for k in FIGURES
                },
                "training_seconds": found[name]["training_seconds"],
            }
            for name in order
        ],
        "runs": [bound["run"], *(found[name]["run"] for name in order)],
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in record["recipes"]:
        alone, three = (
            " ".join(f"{row[key][k]['value']:+.3f}" for k in FIGURES)
            for key in ("gain", "gain_in_threes")
        )
        print(f"{row['recipe']:38} alone {alone}  in threes {three}", flush=True)


def _figures(
    found: dict[str, Any],
    bound: dict[str, Any],
    values: Callable[[dict[str, Any], dict[str, Any], str], list[float]],
) -> dict[str, Any]:
    return {figure: mean_figure(values(found, bound, figure)) for figure in FIGURES}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _gains(found: dict[str, Any], bound: dict[str, Any], figure: str) -> list[float]:
    return [found["each"][name][figure] - own[figure] for name, own in bound["each"].items()]


def _in_threes(found: dict[str, Any], bound: dict[str, Any], figure: str) -> list[float]:
    """Of each three, over the class words of its own subjects."""
    own = {
        label: [bound["each"][name][figure] for name in label.split("+")]
        for label in found["threes"]
    }
    return [found["threes"][label][figure] - sum(v) / len(v) for label, v in own.items()]


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__.splitlines()[0], "recipes", Path("build/concepts"), SUBJECTS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--num", type=int, default=2, help="pictures for each prompt")
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    args = arguments()
    run(args) if args.action == "run" else report(args)
