"""From the parts' files to the rows of the record."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from crosstalk_study.plan import EVERY
from merging_study.statistics import bootstrap, mean_figure

from diagnosis_study.plan import ALONE, OTHERS
from sbora_diffusion.core.functional import VARIANTS

Found = Mapping[str, Any]


def rows(files: Sequence[Found], class_word: Mapping[str, Mapping[str, float]]) -> list[Any]:
    """One row for each variant, rate and snapshot; seeds are averaged.

    Args:
        files: each of one variant, rate and seed.
        class_word: subject → figure → value.
    """
    by_recipe: dict[tuple[int, float], list[Found]] = {}
    for found in files:
        key = VARIANTS.index(found["variant"]), found["rate"]
        by_recipe.setdefault(key, []).append(found)
    return [
        _row(by_recipe[key], steps, class_word)
        for key in sorted(by_recipe)
        for steps in by_recipe[key][0]["snapshots"]
    ]


def _row(runs: Sequence[Found], steps: str, class_word: Mapping[str, Any]) -> dict[str, Any]:
    first, shots = runs[0], [run["snapshots"][steps] for run in runs]
    alone = [_over_seeds([shot["alone"][name] for shot in shots]) for name in class_word]
    bare = list(class_word.values())
    figures = list(bare[0])
    squares = {k: _mean_of([shot["squares"][k] for shot in shots]) for k in (ALONE, *OTHERS)}
    row = {
        **{k: first[k] for k in ("variant", "rate", "rate_unet", "rate_text_encoder")},
        "steps": int(steps),
        "seeds": [run["seed"] for run in runs],
        "parameters": first["parameters"],
        "alone": {k: mean_figure([own[k] for own in alone]) for k in figures},
        "gain": {
            k: mean_figure([own[k] - word[k] for own, word in zip(alone, bare, strict=True)])
            for k in figures
        },
        "crosstalk": {k: crosstalk(squares[k], squares[ALONE]) for k in OTHERS},
    }
    if "parts" in shots[0]:
        row["parts"] = {
            group: shares({k: _mean_of([s["parts"][group][k] for s in shots]) for k in of_group})
            for group, of_group in shots[0]["parts"].items()
        }
    return row


def crosstalk(changes: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """What the others change over what the concept itself does, in mean squares over subjects.

    Args:
        changes, own: (subjects, timesteps).
    """
    by_timestep = changes.mean(0) / own.mean(0)
    return {
        **ratio(changes.mean(1), own.mean(1)),
        "by_timestep": [significant(value) for value in by_timestep],
    }


def shares(energies: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The others' energy over the concept's own, and parts of it, over subjects."""
    others = energies["others"]
    parts = {k: v for k, v in energies.items() if k not in ("own", "others")}
    return {
        "others_over_own": ratio(others, energies["own"]),
        **{
            part: {
                "share": round(float(values.mean() / others.mean()), 4),
                "interval": bootstrap(np.stack([values, others], 1), _quotient),
            }
            for part, values in parts.items()
        },
    }


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, Any]:
    """Ratio of two means over subjects, with its interval, which is found on a log scale."""
    logs = bootstrap(np.stack([above, below], 1), lambda drawn: np.log10(_quotient(drawn)))
    return {
        "value": significant(above.mean() / below.mean()),
        "interval": [significant(10**bound) for bound in logs] if logs else None,
        "of": len(above),
    }


def _quotient(drawn: np.ndarray) -> np.ndarray:
    """(R, N, 2) → (R,): the ratio of the sums of both columns."""
    above, below = drawn.sum(1).T
    return above / below


def significant(value: float) -> float:
    """Four digits, whatever the size."""
    return float(f"{value:.4g}")


def _mean_of(values: Sequence[Any]) -> np.ndarray:
    return np.mean(np.asarray(values, dtype=float), axis=0)


def _over_seeds(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([found[k] for found in figures])) for k in figures[0]}


def shown(row: Mapping[str, Any]) -> str:
    """A row in a line: rate and steps, gains, crosstalk in all layers and by group."""
    gains = " ".join(f"{figure['value']:+.3f}" for figure in row["gain"].values())
    heard = " ".join(f"{row['crosstalk'][k]['value']:9.3g}" for k in OTHERS)
    return f"{row['variant']} x{row['rate']:<5g}{row['steps']:5d} | {gains} | {heard}"


def heading() -> str:
    """What the columns of `shown` are."""
    return f"gain of figures | crosstalk: {', '.join(('all layers', *EVERY))}"
