"""Each concept alone: what a method gives for one subject."""

import time
from collections.abc import Sequence
from itertools import product
from typing import Any

from sbora_diffusion.comparison.work import Work
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.baselines.adapted_methods import ClassWord


def run_single(work: Work) -> None:
    """Draw and judge every concept of every entry and seed that the record does not have.

    A concept whose training or pictures became NaN is recorded as broken.

    Raises:
        ConflictError: the record, or a kept concept, is of another setting.
    """
    jobs = work.part.share(_jobs(work))
    todo = [(*job, left) for job in jobs if (left := work.left(_heads(work, *job)))]
    if not todo:
        return
    measures = work.measures(work.preset.num)
    work.progress.begin(sum(len(left) for *_, left in todo))
    with work.until_the_limit():
        for name, seed, _, left in todo:
            _do(work, measures, name, seed, left)


def _jobs(work: Work) -> list[tuple[str, int, list[str]]]:
    """(entry, seed, concepts that train together); no seed changes a bare class word."""
    names, size = list(work.subjects), work.preset.at_once
    groups = [names[k : k + size] for k in range(0, len(names), size)]
    jobs = []
    for name, (k, seed) in product(work.entries, enumerate(work.seeds)):
        if k == 0 or not isinstance(work.preset.methods[name].how, ClassWord):
            jobs += [(name, seed, group) for group in groups]
    return jobs


def _heads(work: Work, name: str, seed: int, concepts: Sequence[str]) -> list[dict[str, Any]]:
    changes, num = work.tuned.get(name, {}), work.preset.num
    return [work.line(name, concept, seed, num, changes) for concept in concepts]


def _do(work: Work, measures: Any, name: str, seed: int, heads: Sequence[dict[str, Any]]) -> None:
    began, how = time.monotonic(), work.preset.methods[name].how
    try:
        trained = work.trained(name, seed, [head["concept"] for head in heads])
    except NonFiniteError as error:
        for head in heads:
            work.finish(head, began, {"broken": f"training: {error.problem}"})
        return
    keep = work.pictures / "alone" / f"{name}-{seed}" if work.pictures else None
    for head in heads:
        concept = head["concept"]
        own = trained[concept]
        work.progress.say(f"drawing {name}, seed {seed}, {concept}")
        began = time.monotonic()
        found: dict[str, Any] = {
            "trainable": vars(how.trainable(own.concept)),
            "training": own.record(),
            "tuned": name in work.tuned,
        }
        try:
            with how.alone(work.base, own.concept):
                found["alone"] = measures.figures({concept: how.words(own.concept)}, keep)[concept]
        except NonFiniteError as error:
            found["broken"] = error.problem
        work.finish(head, began, found)
