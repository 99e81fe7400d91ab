"""What a merge will change, predicted: a table and a verdict for people, JSON for programs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sbora_diffusion.core.layers import kind, role
from sbora_diffusion.core.prediction import ADDED, CALIBRATED, Disturbance, Forecast
from sbora_diffusion.crosstalk_report import numbers


class Loss(NamedTuple):
    """How image alignment falls with a predictor, measured on merged models.

    Attributes:
        predictor: of `Disturbance.predictors`.
        slope, intercept: of the alignment that is lost.
        correlation: Pearson's, over the concepts of random sets.
        mean: what these lost.
    """

    predictor: str
    slope: float
    intercept: float
    correlation: float
    mean: float


LOSSES: Mapping[str, Loss] = {
    CALIBRATED: Loss("whole", 0.021, -0.0013, 0.0106, 0.0022),
    ADDED: Loss("whole", 0.3732, -0.0225, 0.6425, 0.1402),
}
"""Way of merging → its loss, from results/prediction.json (scripts/study_prediction.py)."""

EXPLANATION = (
    "\nprediction: what a merge changes on a concept's own prompts, over what the concept itself",
    "does there, rms over the layers; 0: nothing, 1: as much as itself. `sbora merge` calibrates",
    "by default; added: --no-calibrate",
)


def prediction_columns() -> list[str]:
    """Headings of `prediction_rows`."""
    losses = [f"image alignment, {way}" for way in LOSSES]
    return ["concept", CALIBRATED, ADDED, *losses, "most in", "loudest other"]


def prediction_rows(found: Forecast) -> list[list[str]]:
    """One row for each concept; "most in" is about the calibrated merge."""
    figures = [_figures(found.ways[way]) for way in (CALIBRATED, ADDED)]
    losses = [_losses(way, found.ways[way]) for way in LOSSES]
    return [
        [
            name,
            *("-" if of[p] is None else f"{of[p]:.2f}" for of in figures),
            *("-" if of[p] is None else f"{of[p]:+.3f}" for of in losses),
            _most(found.ways[CALIBRATED], p),
            _loudest(found, p),
        ]
        for p, name in enumerate(found.crosstalk.names)
    ]


def verdict(found: Forecast) -> list[str]:
    """Which way of merging changes less, and how much that is."""
    first, second = sorted((CALIBRATED, ADDED), key=lambda way: _mean(_known(found.ways[way])))
    advice = "calibrated, as by default" if first == CALIBRATED else "with --no-calibrate"
    generic = [f"{100 * one.of_generic():.1f} % {way}" for way, one in found.ways.items()]
    return [
        f"verdict: merge them {advice}: {_extent(found.ways[first])}",
        f"{second}: {_extent(found.ways[second])}",
        f"prompts without a concept: outputs of the layers change by {', '.join(generic)}",
        *(
            f"image alignment, {way}: random sets on pocket lost {loss.mean:.3f} in the mean; "
            f"correlation with what is predicted here, from {loss.predictor!r}: "
            f"{loss.correlation:.2f} (results/prediction.json)"
            for way, loss in LOSSES.items()
        ),
    ]


def prediction_document(found: Forecast) -> dict[str, Any]:
    """Way of merging → figures of every concept and of prompts without any."""
    return {way: _document(way, one) for way, one in found.ways.items()}


def _document(way: str, one: Disturbance) -> dict[str, Any]:
    predictors = {name: numbers(values) for name, values in one.predictors().items()}
    groups = {name: numbers(values) for name, values in one.grouped(role).items()}
    losses = _losses(way, one) if way in LOSSES else [None] * len(one.names)
    concepts = [
        {
            "concept": name,
            "disturbance": predictors["rms"][p],
            "image_alignment": losses[p],
            "predictors": {key: values[p] for key, values in predictors.items()},
            "groups": {key: values[p] for key, values in groups.items()},
        }
        for p, name in enumerate(one.names)
    ]
    return {"concepts": concepts, "unrelated_prompts": one.of_generic()}


def _figures(one: Disturbance) -> list[float | None]:
    return numbers(one.rms())


def _losses(way: str, one: Disturbance) -> list[float | None]:
    """Change of image alignment, negative where it falls."""
    loss = LOSSES[way]
    values = numbers(one.predictors()[loss.predictor])
    return [None if v is None else -(loss.slope * v + loss.intercept) for v in values]


def _known(one: Disturbance) -> list[tuple[float, str]]:
    """Figure and name, without concepts that do nothing themselves."""
    pairs = zip(_figures(one), one.names, strict=True)
    return [(value, name) for value, name in pairs if value is not None]


def _mean(known: list[tuple[float, str]]) -> float:
    return sum(value for value, _ in known) / max(len(known), 1)


def _extent(one: Disturbance) -> str:
    """E.g. "0.21 in the mean, 0.34 at worst (owl), for none as much as itself"."""
    known = _known(one)
    if not known:
        return "there is nothing to disturb"
    worst, name = max(known)
    drowned = sum(value >= 1 for value, _ in known)
    against = f"for {drowned} of {len(known)}" if drowned else "for none"
    return f"{_mean(known):.2f} in the mean, {worst:.2f} at worst ({name}), {against} 1 or more"


def _most(one: Disturbance, p: int) -> str:
    """The kind of layer in which p is disturbed most."""
    groups = [(numbers(values)[p], name) for name, values in one.grouped(kind).items()]
    known = [(value, name) for value, name in groups if value is not None]
    return f"{max(known)[1]} {max(known)[0]:.2f}" if known else "-"


def _loudest(found: Forecast, p: int) -> str:
    """Whose own update is loudest on p's prompts."""
    ratios = zip(numbers(found.crosstalk.rms()[p]), found.crosstalk.names, strict=True)
    known = [(r, name) for q, (r, name) in enumerate(ratios) if q != p and r is not None]
    return f"{max(known)[1]} {max(known)[0]:.2f}" if known else "-"
