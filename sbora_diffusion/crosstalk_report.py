"""Crosstalk of every two concepts: heat maps for people, JSON for programs."""

import math
from typing import Any

from torch import Tensor

from sbora_diffusion.core.crosstalk import Crosstalk
from sbora_diffusion.core.layers import role
from sbora_diffusion.plots import Heat

MEANING = "row: whose prompts; column: who disturbs; 0 = silent, 1 = as loud as the concept itself"


def crosstalk_document(measured: Crosstalk) -> dict[str, Any]:
    """Everything that was measured; matrices are [whose prompts][who disturbs]."""
    count = range(len(measured.names))
    ratios = measured.ratios()
    return {
        "concepts": list(measured.names),
        "rms": numbers(measured.rms()),
        "worst": [[_worst(measured, p, q) if p != q else None for q in count] for p in count],
        "groups": {name: numbers(m) for name, m in measured.grouped(role).items()},
        "layers": {layer: numbers(ratios[:, :, k]) for k, layer in enumerate(measured.layers)},
        "norms": {
            layer: numbers(measured.norms[:, :, k]) for k, layer in enumerate(measured.layers)
        },
    }


def heat_maps(measured: Crosstalk) -> list[Heat]:
    """Concepts × concepts over all layers, and groups of layers × pairs of concepts."""
    names = measured.names
    pairs = [(p, q) for p in range(len(names)) for q in range(len(names)) if p != q]
    rms = numbers(measured.rms())
    for k in range(len(names)):
        rms[k][k] = None
    groups = {name: numbers(matrix) for name, matrix in measured.grouped(role).items()}
    maps = [Heat("Crosstalk, rms over all layers", MEANING, names, names, rms)]
    if pairs:
        maps.append(
            Heat(
                "Crosstalk, rms over the layers of a group",
                "column: who disturbs whose prompts",
                list(groups),
                [f"{names[q]} on {names[p]}" for p, q in pairs],
                [[matrix[p][q] for p, q in pairs] for matrix in groups.values()],
            )
        )
    return maps


def _worst(measured: Crosstalk, p: int, q: int) -> dict[str, Any] | None:
    worst = measured.worst(p, q)
    return {"layer": worst[0], "ratio": worst[1]} if worst else None


def numbers(values: Tensor) -> list[Any]:
    """Nested lists of any depth; JSON has no NaN."""
    if values.dim() == 1:
        return [None if math.isnan(x) else x for x in values.tolist()]
    return [numbers(row) for row in values]
