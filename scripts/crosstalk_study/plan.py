"""The subjects, the recipes and the ways of merging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from recipe_study.plan import PLAIN
from recipe_study.plan import SUBJECTS as HELD_OUT

from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluate import PROMPTS

SUBJECTS = HELD_OUT[:14]
"""Held-out subjects that are not among the committed concepts; all of them in one model."""
SEEDS = (0, 1, 2)

STRANGERS = ("cat", "car", "chair", "cake")
"""Nouns of which no subject is one."""
UNRELATED = tuple(p.format(with_article(noun)) for noun, p in product(STRANGERS, PROMPTS))
"""Prompts without any concept."""


@dataclass(frozen=True)
class Recipe:
    """How concepts are trained.

    Attributes:
        changes: in the default recipe.
        layers: groups of layers that are adapted, see `layer_group`; all if empty.
        white: whether factors are trained in coordinates that generic inputs fill evenly, and how
            much of the mean energy is added to each coordinate's.
        alone: steps in which the placeholder trains alone, before the factors.
        quiet: whether FA concepts own the inputs that generic prompts excite least, rather than
            those of their slots.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    white: float | None = None
    alone: int = 0
    quiet: bool = False


EVERY = TEXT, KEYS_VALUES, QUERIES_OUT, SELF = (
    "text encoder", "keys, values", "queries, outputs", "self",
)  # fmt: skip


def layer_group(name: str) -> str:
    """The group of an adapted layer, by its canonical name."""
    if name.startswith("text_encoder."):
        return TEXT
    if ".attn1." in name:
        return SELF
    return KEYS_VALUES if name.endswith(("to_k", "to_v")) else QUERIES_OUT


LOUD = {"rate_unet": 3e-3, "rate_text_encoder": 2e-3}
KEPT = {**PLAIN, **LOUD, "preservation": 1.0}
FB = {"variant": "fb", "rate_unet": 2e-3}
SHORTER = {**KEPT, "steps": 400, "vectors": 8, "batch_size": 8}
TOKEN = {**PLAIN, **dict.fromkeys(LOUD, 0.0)}
LONG = {**KEPT, "steps": 600, "vectors": 8, "batch_size": 8}

RECIPES: dict[str, Recipe] = {
    "plain": Recipe(PLAIN),
    "fb": Recipe({**PLAIN, "variant": "fb", "rate_unet": 5e-4}),
    "loud": Recipe({**PLAIN, **LOUD}),
    "loud, batch 8": Recipe({**PLAIN, **LOUD, "batch_size": 8}),
    "preserved": Recipe(KEPT),
    "preserved, 2 rows": Recipe({**KEPT, "preservation_rows": 2}),
    "preserved, weight 3": Recipe({**KEPT, "preservation": 3.0}),
    "preserved, weight 10": Recipe({**KEPT, "preservation": 10.0}),
    "preserved, batch 8": Recipe({**KEPT, "batch_size": 8}),
    "preserved, batch 8, quiet columns": Recipe({**KEPT, "batch_size": 8}, quiet=True),
    "preserved, batch 8, decay": Recipe({**KEPT, "batch_size": 8, "weight_decay": 1.0}),
    "preserved, fb": Recipe({**KEPT, **FB}),
    "preserved, text encoder": Recipe(KEPT, (TEXT,)),
    "preserved, keys and values": Recipe(KEPT, (KEYS_VALUES,)),
    "preserved, cross-attention": Recipe(KEPT, (KEYS_VALUES, QUERIES_OUT)),
    "white, fb": Recipe({**PLAIN, "variant": "fb", **dict.fromkeys(LOUD, 3e-3)}, white=1e-2),
    "white, fb, louder": Recipe(
        {**PLAIN, "variant": "fb", **dict.fromkeys(LOUD, 1e-2)}, white=1e-3
    ),
    "loud, batch 8, 8 vectors": Recipe({**PLAIN, **LOUD, "batch_size": 8, "vectors": 8}),
    "preserved, weight 3, batch 8": Recipe({**KEPT, "preservation": 3.0, "batch_size": 8}),
    "loud, token first, 8 vectors": Recipe({**SHORTER, "preservation": 0.0}, alone=200),
    "token first, 8 vectors, weight 3": Recipe({**SHORTER, "preservation": 3.0}, alone=200),
    "preserved, batch 8, 8 vectors": Recipe({**KEPT, "batch_size": 8, "vectors": 8}),
    "token first": Recipe({**KEPT, "steps": 600}, alone=200),
    "token first, 8 vectors": Recipe(SHORTER, alone=200),
    "token first, 8 vectors, quiet": Recipe({**SHORTER, **dict.fromkeys(LOUD, 1e-3)}, alone=200),
    "token first, long": Recipe(LONG, alone=300),
    "token only, long": Recipe({**TOKEN, "vectors": 8, "batch_size": 8}),
    "token only, 16 vectors": Recipe({**TOKEN, "vectors": 16, "batch_size": 8}),
    "quiet": Recipe({**PLAIN, "rate_unet": 4e-4}),
}
"""Name → how all subjects are trained."""
NO_REMEDY = ("plain", "fb", "loud", "loud, batch 8", "loud, batch 8, 8 vectors", "quiet",
         "loud, token first, 8 vectors")  # fmt: skip
"""Those that have no remedy against crosstalk in them."""


@dataclass(frozen=True)
class Merge:
    """How concepts come into one model.

    Attributes:
        weight: λ of each; None for one over their number.
        calibration: settings of `CalibrateConfig`; None for a plain sum.
    """

    weight: float | None = 1.0
    calibration: Mapping[str, Any] | None = None


MORE = (
    *CalibrateConfig().prompts,
    "a photo of {} in a library",
    "a photo of {} near a volcano",
    "a sketch of {} on a stage",
    "a painting of {} in a garden",
    "{} in a city at night",
    "{} in front of a castle next to a chair",
)
"""Prompts of a concept's own, none of those that it is judged by."""

MERGES: dict[str, Merge] = {
    "added": Merge(),
    "added, weight 0.6": Merge(0.6),
    "averaged": Merge(None),
    "calibrated": Merge(calibration={"gain": 1.0}),
    "calibrated, more activations": Merge(
        calibration={"prompts": MORE, "steps": 6, "generic": 160, "gain": 1.0}
    ),
    "calibrated, gain 1.1": Merge(calibration={"gain": 1.1}),
    "calibrated, gain 1.2": Merge(calibration={"gain": 1.2}),
    "refined": Merge(calibration={"refine": 300}),
    "calibrated, generic 1": Merge(calibration={"generic_weight": 1 / len(SUBJECTS), "gain": 1.0}),
    "calibrated, generic 1, gain 1.1": Merge(
        calibration={"generic_weight": 1 / len(SUBJECTS), "gain": 1.1}
    ),
    "calibrated, generic 1, ridge 1e-5": Merge(
        calibration={"generic_weight": 1 / len(SUBJECTS), "ridge": 1e-5, "gain": 1.0}
    ),
    "calibrated, generic 30": Merge(
        calibration={"generic_weight": 30 / len(SUBJECTS), "gain": 1.0}
    ),
    "calibrated, generic 300": Merge(
        calibration={"generic_weight": 300 / len(SUBJECTS), "gain": 1.0}
    ),
}
"""Name → how they are merged; generic 1, 30, 300 is the weight for all concepts together, which by
default is 5."""
