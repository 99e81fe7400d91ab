"""How many concepts: the subjects in their order, what is trained, and how it is merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crosstalk_study.plan import RECIPES, Merge
from recipe_study.plan import PLAIN
from recipe_study.plan import SUBJECTS as HELD_OUT

SUBJECTS = (
    *HELD_OUT,
    "bluegirl", "darkshades", "rowboat", "greenchair", "orangelamp", "bluegift", "leatherwatch",
    "postmailbox", "bluebike", "nightscooter", "springrider", "citybus", "flowercup", "potcactus",
    "bonsai", "greentent", "dollhouse", "bactriancamel", "ladybird", "polarbear", "mammoth",
    "blackcat", "tropicalfish", "locomotive",
)  # fmt: skip
"""Forty, none of them committed. The order is that of the slots, and n concepts are the first n:
those of the study of crosstalk, two more of the study of recipes, then of concepts/HELD_OUT.txt,
from the top, each whose class noun none before it has."""
COUNTS = (1, 2, 4, 8, 14, 28, 40)
SEEDS = (0, 1)
RANK = 4
"""The base's narrowest layers are 160 wide: forty disjoint ranges."""

Kind = Literal["sbora", "lora", "orthogonal"]

WINNER: Mapping[str, Any] = {}
PEER_RATES = {**PLAIN, "rate_unet": 3e-3, "rate_text_encoder": 5e-4}
"""Of LoRA at rank 4: the best sum of text and image alignment, of three, in results/pairs.json
(`learning_rates`; 300 steps then, and a cosine)."""


@dataclass(frozen=True)
class Training:
    """How all concepts are trained.

    Attributes:
        changes: in the default recipe, beside rank and seed.
        merges: method → how its concepts come into one model.
        about: what is to be known of it, for the record.
    """

    kind: Kind
    changes: Mapping[str, Any]
    merges: Mapping[str, Merge]
    about: str


def trainings(
    winner: Mapping[str, Any], calibration: Mapping[str, Any], peers: Mapping[str, Any]
) -> dict[str, Training]:
    """Name → training.

    Args:
        winner: changes in the default recipe.
        calibration: settings of the winner's `CalibrateConfig`.
        peers: changes for LoRA and Orthogonal Adaptation.
    """
    return {
        "winner": Training(
            "sbora", winner, {"winner": Merge(calibration=calibration)}, "calibrated merge"
        ),
        "plain FA": Training("sbora", PLAIN, {"plain FA": Merge()}, "no remedy"),
        "plain FB": Training(
            "sbora", RECIPES["fb"].changes, {"plain FB": Merge()}, "rows in place of columns"
        ),
        "LoRA": Training(
            "lora",
            peers,
            {"LoRA sum": Merge(), "LoRA 1/n": Merge(None)},
            "both factors are trained, alpha = rank (arXiv 2106.09685)",
        ),
        "Orthogonal Adaptation": Training(
            "orthogonal",
            peers,
            {"Orthogonal Adaptation, 0.6": Merge(0.6), "Orthogonal Adaptation, 1": Merge()},
            "each concept's down factor is frozen, rows of its own of one random orthogonal basis "
            "for each layer; merged with 0.6 (arXiv 2312.02432). Its authors train factors at 1e-5 "
            "and tokens at 1e-3 on Stable Diffusion; here the rates are LoRA's",
        ),
    }
