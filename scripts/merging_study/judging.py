"""What the pictures are worth: alignment by condition, changes, and predicted crosstalk beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image

from merging_study.archive import Archive
from merging_study.plan import (
    ALL,
    BASE,
    CLASS_WORD,
    CONDITIONS,
    MIXED,
    ROUTED,
    SAME,
    SINGLE,
    UNRELATED,
    numbered,
)
from merging_study.statistics import mean_figure, rank_correlation
from sbora_diffusion.alignment import Features, Judges, score
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluation.metrics import similarity

TEXT = "text_alignment"
MERGED = (SAME, MIXED, ALL)
Measures = Mapping[str, float]
"""Text alignment, and image alignment by the name of the features."""


@dataclass(frozen=True)
class Point:
    """A concept in a merged set: how much of it is lost, and what crosstalk predicts."""

    concept: str
    merged_with: tuple[str, ...]
    condition: str
    measures: Measures


@dataclass(frozen=True)
class Scored:
    """Measures of all concepts in all conditions.

    Attributes:
        each: concept → condition → measures; of threes the mean over those that have the concept.
        points: every merged set that a concept is in.
    """

    each: Mapping[str, Mapping[str, Measures]]
    points: Sequence[Point]


def score_all(
    archive: Archive, references: Mapping[str, Sequence[Image.Image]], judges: Judges
) -> Scored:
    """Judge the pictures of every concept.

    Args:
        references: concept → pictures of the subject.
    """
    each, points = {}, []
    for name in archive.facts["concepts"]:
        compared = judges.features(references[name])
        found = {
            group: _measures(archive, name, group, compared, judges)
            for group in archive.groups
            if group.split("/")[1] == name
        }
        single = found[f"{SINGLE}/{name}"]
        # Routed pictures are kept only where they differ from those of the concept alone.
        conditions = {CLASS_WORD: found[f"{CLASS_WORD}/{name}"], SINGLE: single}
        conditions[ROUTED] = found.get(f"{ROUTED}/{name}", single)
        merged = [
            _point(archive, name, group, measures)
            for group, measures in found.items()
            if group.startswith(MERGED)
        ]
        for condition in MERGED:
            conditions[condition] = _mean([p.measures for p in merged if p.condition == condition])
        each[name] = conditions
        points += merged
    return Scored(each, points)


def figures(scored: Scored) -> dict[str, Any]:
    """Means over concepts by condition, changes against the concept alone, and every concept."""
    each = scored.each
    names = list(next(iter(each.values()))[SINGLE])
    changes = {
        condition: {m: [c[condition][m] - c[SINGLE][m] for c in each.values()] for m in names}
        for condition in CONDITIONS
        if condition != SINGLE
    }
    return {
        "means": {
            condition: {m: mean_figure([c[condition][m] for c in each.values()]) for m in names}
            for condition in CONDITIONS
        },
        "change_against_single": {
            condition: {m: mean_figure(values) for m, values in found.items()}
            for condition, found in changes.items()
        },
        "kept_of_the_image_gain": {
            condition: {m: _kept(each, condition, m) for m in names if m != TEXT}
            for condition in MERGED
        },
        "each": {name: _rounded_all(conditions) for name, conditions in each.items()},
    }


def crosstalk_figures(scored: Scored, names: Sequence[str], rms: np.ndarray) -> dict[str, Any]:
    """Predicted disturbance beside measured loss, in threes and with all.

    What concepts q of a set predict for p is the root of Σ rms[p, q]², as if they disturbed it
    independently of each other; loss is alignment alone minus merged.

    Args:
        names: of the P concepts.
        rms: (P, P), [whose prompts][who disturbs], see `Crosstalk.rms`.
    """
    rows = []
    for point in scored.points:
        single = scored.each[point.concept][SINGLE]
        others = [names.index(name) for name in point.merged_with]
        predicted = float(np.sqrt((rms[names.index(point.concept), others] ** 2).sum()))
        rows.append(
            {
                "concept": point.concept,
                "merged_with": list(point.merged_with),
                "condition": point.condition,
                "predicted": round(predicted, 4),
                "loss": {m: round(single[m] - v, 4) for m, v in point.measures.items()},
            }
        )
    threes = [row for row in rows if row["condition"] != ALL]
    every = [row for row in rows if row["condition"] == ALL]
    return {
        "rank_correlation": {"threes": _correlations(threes), "all": _correlations(every)},
        "predicted": {
            "threes": round(mean(row["predicted"] for row in threes), 4),
            "all": round(mean(row["predicted"] for row in every), 4),
        },
        "rms": [[round(float(value), 4) for value in row] for row in rms],
        "concepts": list(names),
        "points": rows,
    }


def unrelated_figures(archive: Archive, judges: Judges) -> dict[str, Any]:
    """Prompts that name no concept, before and after all were merged.

    `cosine` is that of the two pictures of a prompt; `cosine_other_prompts` is what pictures of
    different prompts reach, the level at which nothing of the picture would be left.
    """
    prompts = archive.facts["unrelated"]
    pictures = {name: archive.groups[f"{UNRELATED}/{name}"] for name in (BASE, ALL)}
    text = {name: score(judges, found, prompts).text.tolist() for name, found in pictures.items()}
    own, others = {}, {}
    for judge in (judges.clip, *judges.further):
        cosines = similarity(judge.images(pictures[BASE]), judge.images(pictures[ALL]))
        own[judge.name] = mean_figure(cosines.diagonal().tolist())
        count = len(prompts) * (len(prompts) - 1)
        others[judge.name] = round((cosines.sum() - cosines.trace()).item() / count, 4)
    change = [after - before for after, before in zip(text[ALL], text[BASE], strict=True)]
    return {
        "prompts": len(prompts),
        TEXT: {name: mean_figure(values) for name, values in text.items()},
        "text_alignment_change": mean_figure(change),
        "cosine": own,
        "cosine_other_prompts": others,
        "pixel_difference": mean_figure(_pixel_differences(pictures[BASE], pictures[ALL])),
    }


def merge_seconds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median time of folding so many concepts into the bare base."""
    counts = sorted({entry["concepts"] for entry in entries})
    times = {n: [e["seconds"] for e in entries if e["concepts"] == n] for n in counts}
    return {
        str(n): {"median": round(median(found), 4), "of": len(found)} for n, found in times.items()
    }


def _measures(
    archive: Archive, name: str, group: str, compared: Features, judges: Judges
) -> Measures:
    settings, noun = archive.facts["settings"], archive.facts["concepts"][name]["class_noun"]
    texts = numbered(settings["prompts"], with_article(noun), settings["num"])
    found = score(judges, archive.groups[group], texts, compared)
    return {TEXT: found.text.mean().item(), **{k: v.mean().item() for k, v in found.image.items()}}


def _point(archive: Archive, name: str, group: str, measures: Measures) -> Point:
    condition, *rest = group.split("/")
    everyone = rest[1].split("+") if len(rest) > 1 else archive.facts["concepts"]
    return Point(name, tuple(other for other in everyone if other != name), condition, measures)


def _mean(found: Sequence[Measures]) -> Measures:
    return {name: mean(measures[name] for measures in found) for name in found[0]}


def _kept(each: Mapping[str, Mapping[str, Measures]], condition: str, measure: str) -> float | None:
    """Share of what concepts gain over the bare class word that is left after merging."""
    gain = sum(c[SINGLE][measure] - c[CLASS_WORD][measure] for c in each.values())
    left = sum(c[condition][measure] - c[CLASS_WORD][measure] for c in each.values())
    return round(left / gain, 4) if gain > 0 else None


def _correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    predicted = [row["predicted"] for row in rows]
    return {
        m: rank_correlation(predicted, [row["loss"][m] for row in rows]) for m in rows[0]["loss"]
    }


def _pixel_differences(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> list[float]:
    """Mean absolute difference of each pair, 0 to 1."""
    pairs = zip(before, after, strict=True)
    return [float(np.abs(np.float32(a) - np.float32(b)).mean() / 255) for a, b in pairs]


def _rounded_all(conditions: Mapping[str, Measures]) -> dict[str, dict[str, float]]:
    return {c: {m: round(v, 4) for m, v in found.items()} for c, found in conditions.items()}
