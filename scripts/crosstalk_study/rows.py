"""The record of the study: files of runs joined, means and intervals over the concepts.

A recipe and seed may have been run more than once, with other ways of merging. Changes are always
those against the concepts of the same run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from merging_study.statistics import mean_figure
from study_options import FIGURES

from crosstalk_study.plan import MERGES, NO_REMEDY, RECIPES, SEEDS

WHAT = "alignment of concepts alone and in one model, by training recipe and way of merging"
CLASS_WORD = "class word"
STRONG = 0.1
"""What a concept alone reaches over the class word, in both image features, to be called strong."""

Found = Mapping[str, Any]
Figures = Mapping[str, Mapping[str, float]]
"""Concept → figures."""


def record_of(bound: Found, files: Sequence[Found]) -> dict[str, Any]:
    """Everything from the runs' files; what was not run with all seeds is left out.

    Args:
        bound: of the class words.
    """
    by_recipe = {name: [f for f in files if f["recipe"] == name] for name in RECIPES}
    runs = {name: found for name, found in by_recipe.items() if _complete(found)}
    alone = {name: _alone(found) for name, found in runs.items()}
    best = max((name for name in NO_REMEDY if name in alone), key=lambda name: _worth(alone[name]))
    return {
        "what": WHAT,
        **{key: bound["run"][key] for key in ("date", "commit", "device", "versions")},
        "subjects": list(bound["alone"]),
        "class_word": _means(bound["alone"]),
        "unrelated": {"noise": bound["noise"], "text_alignment": bound["text_of_unrelated"]},
        "best_plain": {"recipe": best, "strong": _strong(alone[best], bound["alone"])},
        "recipes": [_row(name, runs[name], alone, best, bound) for name in runs],
        "runs": [bound["run"], *(found["run"] for name in runs for found in runs[name])],
    }


def _complete(runs: Sequence[Found]) -> bool:
    """Whether all seeds were run."""
    return {found["seed"] for found in runs} >= set(SEEDS)


def _worth(alone: Figures) -> float:
    """Text alignment and the mean of both image alignments, over the concepts."""
    text, *images = (sum(f[k] for f in alone.values()) / len(alone) for k in FIGURES)
    return text + sum(images) / len(images)


def _row(
    name: str, runs: Sequence[Found], alone: Mapping[str, Figures], best: str, bound: Found
) -> dict[str, Any]:
    """One recipe, over its seeds; a concept's figure is the mean over them."""
    recipe, own = RECIPES[name], alone[name]
    ways = [way for way in MERGES if _complete([f for f in runs if way in f["merged"]])]
    return {
        "recipe": name,
        "changes": dict(recipe.changes),
        "layers": list(recipe.layers),
        "white": recipe.white,
        "alone_steps": recipe.alone,
        "seeds": sorted({found["seed"] for found in runs}),
        "training_seconds": max(found["training_seconds"] for found in runs),
        "alone": _means(own),
        "strong": _strong(own, bound["alone"]),
        "against_best_plain": _means(_changes(own, alone[best])),
        "merged": {
            way: _way([f for f in runs if way in f["merged"]], way, (own, alone[best]), bound)
            for way in ways
        },
    }


def _way(
    runs: Sequence[Found], way: str, alone: tuple[Figures, Figures], bound: Found
) -> dict[str, Any]:
    """What one way of merging makes of a recipe's concepts.

    Args:
        alone: figures of this recipe's concepts, and of the best plain recipe's.
    """
    own, best = alone
    parts = [found["merged"][way] for found in runs]
    change = _over_seeds(
        runs, [_changes(p["each"], f["alone"]) for f, p in zip(runs, parts, strict=True)]
    )
    each = {c: {k: own[c][k] + change[c][k] for k in FIGURES} for c in change}
    texts = [part["text_of_unrelated"] - bound["text_of_unrelated"] for part in parts]
    return {
        "seeds": sorted({found["seed"] for found in runs}),
        "seconds": max(part["seconds"] for part in parts),
        **_changed("", change, _strong(own, bound["alone"])),
        **_changed("_against_best_plain", _changes(each, best), _strong(best, bound["alone"])),
        "unrelated_distance": {
            k: round(sum(part["distance"][k] for part in parts) / len(parts), 5)
            for k in FIGURES[1:]
        },
        "unrelated_text_change": round(sum(texts) / len(texts), 4),
    }


def _changed(name: str, change: Figures, strong: Sequence[str]) -> dict[str, Any]:
    of_strong = {concept: change[concept] for concept in strong}
    return {
        f"change{name}": _means(change),
        f"worst{name}": _worst(change),
        f"change{name}_of_strong": _means(of_strong) if strong else None,
        f"worst{name}_of_strong": _worst(of_strong) if strong else None,
    }


def _alone(runs: Sequence[Found]) -> Figures:
    return _over_seeds(runs, [found["alone"] for found in runs])


def _over_seeds(runs: Sequence[Found], figures: Sequence[Figures]) -> Figures:
    """Mean over the seeds, runs of one seed being averaged first."""
    pairs = list(zip(runs, figures, strict=True))
    seeds = sorted({found["seed"] for found in runs})
    return _mean([_mean([f for found, f in pairs if found["seed"] == seed]) for seed in seeds])


def _mean(figures: Sequence[Figures]) -> Figures:
    return {
        concept: {k: sum(one[concept][k] for one in figures) / len(figures) for k in FIGURES}
        for concept in figures[0]
    }


def _changes(figures: Figures, before: Figures) -> Figures:
    return {c: {k: figures[c][k] - before[c][k] for k in FIGURES} for c in figures}


def _strong(alone: Figures, bare: Figures) -> list[str]:
    return [c for c, f in alone.items() if all(f[k] - bare[c][k] >= STRONG for k in FIGURES[1:])]


def _means(figures: Figures) -> dict[str, Any]:
    return {k: mean_figure([f[k] for f in figures.values()]) for k in FIGURES}


def _worst(figures: Figures) -> dict[str, float]:
    return {k: round(min(f[k] for f in figures.values()), 4) for k in FIGURES}
