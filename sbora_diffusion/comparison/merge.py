"""Concepts in one model: what merging costs each method, in each of its ways."""

import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from sbora_diffusion.comparison.measuring import Figures, Measures
from sbora_diffusion.comparison.trained import Trained
from sbora_diffusion.comparison.work import Work
from sbora_diffusion.core.errors import ConfigError, NonFiniteError

Concepts = Mapping[str, Trained[Any]]
Head = dict[str, Any]


def run_merge(work: Work) -> None:
    """Judge every concept before and after merging, where the record does not have it.

    All subjects of the work are merged, and groups of them by the preset's `together`. What became
    NaN is recorded as broken.

    Raises:
        ConfigError: there is nothing to merge.
        ConflictError: the record, or a kept concept, is of another setting.
    """
    entries = [name for name in work.entries if work.preset.methods[name].merged]
    if not entries or len(work.subjects) < 2:
        raise ConfigError(
            f"there is nothing to merge: {len(entries)} methods that are merged, "
            f"{len(work.subjects)} concepts",
            "give two concepts or more, and a method that the preset merges",
        )
    jobs = work.part.share(list(product(entries, work.seeds)))
    todo = [(name, seed, left) for name, seed in jobs if (left := _left(work, name, seed))]
    if not todo:
        return
    measures = work.measures(work.preset.merge_num or work.preset.num, by_group=False)
    work.progress.begin(sum(len(heads) for *_, ways in todo for heads in ways.values()))
    with work.until_the_limit():
        for name, seed, ways in todo:
            _do(work, measures, name, seed, ways)


def sizes_of(together: Sequence[int], count: int) -> list[int]:
    """How many concepts are merged, each size once; all of them come last."""
    return [*sorted({size for size in together if size < count}), count]


def groups_of(names: Sequence[str], size: int) -> list[tuple[list[str], list[str]]]:
    """(concepts that are merged, those of them that are judged): each is judged once.

    Names are cut into groups in their order; the last group is filled up from the start.
    """
    around, found = [*names, *names], []
    for k in range(0, len(names), size):
        found.append((around[k : k + size], list(names[k : k + size])))
    return found


def _heads(work: Work, name: str, seed: int, way: str) -> list[Head]:
    preset, names = work.preset, list(work.subjects)
    num, title = preset.merge_num or preset.num, preset.methods[name].how.merges[way].title
    merged = {"sizes": sizes_of(preset.together, len(names)), "concepts": names}
    heads = [
        work.line(name, c, seed, num, work.tuned.get(name, {}), merge=way, merge_title=title)
        for c in names
    ]
    return [{**head, "setting": {**head["setting"], "merged": merged}} for head in heads]


def _left(work: Work, name: str, seed: int) -> dict[str, list[Head]]:
    """Way of merging → lines that the record does not have."""
    ways = work.preset.methods[name].how.merges
    found = {way: work.left(_heads(work, name, seed, way)) for way in ways}
    return {way: heads for way, heads in found.items() if heads}


def _do(
    work: Work, measures: Measures, name: str, seed: int, ways: Mapping[str, list[Head]]
) -> None:
    began = time.monotonic()
    try:
        trained = work.trained(name, seed, list(work.subjects))
    except NonFiniteError as error:
        for heads in ways.values():
            for head in heads:
                work.finish(head, began, {"broken": f"training: {error.problem}"})
        return
    before = _before(work, measures, name, seed, trained)
    for way, heads in ways.items():
        began = time.monotonic()
        after: dict[str, dict[str, Any]] = {head["concept"]: {} for head in heads}
        for size in heads[0]["setting"]["merged"]["sizes"]:
            for merged, judged in groups_of(list(trained), size):
                if wanted := [concept for concept in judged if concept in after]:
                    work.progress.say(f"merging {name}, seed {seed}, {way}, {size} concepts")
                    some = {concept: trained[concept] for concept in merged}
                    found = _merged(work, measures, name, seed, way, some, wanted)
                    for concept in wanted:
                        after[concept][str(size)] = {"with": merged, **found[concept]}
        for head in heads:
            concept = head["concept"]
            work.finish(head, began, {"before": before[concept], "after": after[concept]})


def _before(
    work: Work, measures: Measures, name: str, seed: int, trained: Concepts
) -> dict[str, Figures | None]:
    """Concept → figures of it alone, drawn once for all ways; None where they are NaN."""
    how, found = work.preset.methods[name].how, _known(work, name, seed)
    keep = work.pictures / "before" / f"{name}-{seed}" if work.pictures else None
    for concept, own in trained.items():
        if concept in found:
            continue
        work.progress.say(f"drawing {name}, seed {seed}, {concept}")
        try:
            with how.alone(work.base, own.concept):
                found |= measures.figures({concept: how.words(own.concept)}, keep)
        except NonFiniteError:
            found[concept] = None
    return found


def _known(work: Work, name: str, seed: int) -> dict[str, Figures | None]:
    """What lines of other ways, before an interruption, have."""
    heads = [h for w in work.preset.methods[name].how.merges for h in _heads(work, name, seed, w)]
    lines = [line for head in heads if (line := work.record.find(head)) is not None]
    return {line["concept"]: line["before"] for line in lines if "before" in line}


def _merged(
    work: Work,
    measures: Measures,
    name: str,
    seed: int,
    way: str,
    some: Concepts,
    judged: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Concept → seconds of the merge, and figures or what is broken."""
    how, device = work.preset.methods[name].how, work.base.device
    folder = f"{name}-{seed}-{way}-{len(some)}"
    keep = work.pictures / "merged" / folder if work.pictures else None
    words = {concept: how.words(some[concept].concept) for concept in judged}
    _wait_for(device)
    began = time.monotonic()
    try:
        with how.merged(work.base, [own.concept for own in some.values()], way):
            _wait_for(device)
            seconds = round(time.monotonic() - began, 3)
            figures = measures.figures(words, keep)
        return {c: {"seconds": seconds, "figures": figures[c]} for c in judged}
    except NonFiniteError as error:
        return {c: {"broken": error.problem} for c in judged}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
