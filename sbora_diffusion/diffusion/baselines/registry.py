"""All methods of the comparison, by name."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from sbora_diffusion.diffusion.baselines.adapted_methods import (
    MEAN,
    SUM,
    SUM_06,
    AdaptedMethod,
    ClassWord,
)
from sbora_diffusion.diffusion.baselines.adapting import WordTraining
from sbora_diffusion.diffusion.baselines.custom_diffusion import (
    ConstrainedConfig,
    FullTraining,
    constraining,
)
from sbora_diffusion.diffusion.baselines.fusion import STOPPED_EARLY, FusionConfig, fusing
from sbora_diffusion.diffusion.baselines.interface import Merge, Method
from sbora_diffusion.diffusion.baselines.low_rank import LowRankTraining, MagnitudeTraining
from sbora_diffusion.diffusion.baselines.recipes import (
    CUSTOM_DIFFUSION,
    DORA,
    LORA,
    LORA_FA,
    MIX_OF_SHOW,
    ORTHOGONAL,
    RANDOM_FIRST,
    SBORA,
    SBORA_FA,
    SBORA_FB,
    TEXTUAL_INVERSION,
)
from sbora_diffusion.diffusion.baselines.sbora import (
    Sbora,
    add_folded,
    add_overlapping,
    calibrating,
)
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.refinement import STEPS

FOLDED = {
    "sum": Merge("sum", add_folded),
    "sum-0.6": Merge("sum, λ = 0.6", add_folded, 0.6),
}
OVERLAPPING = {
    "sum": Merge("sum", add_overlapping),
    "sum-0.6": Merge("sum, λ = 0.6", add_overlapping, 0.6),
}
CALIBRATED = {
    "calibrated": Merge("calibrated", calibrating(CalibrateConfig())),
    "refined": Merge("calibrated, refined", calibrating(CalibrateConfig(refine=STEPS))),
    **FOLDED,
}
AVERAGED = {"sum": SUM, "mean": MEAN}


def _low_rank(base: Base, lessons: Sequence[Lesson], name: str, **options: Any) -> LowRankTraining:
    return LowRankTraining(base, lessons, name, **options)


def _custom_diffusion() -> AdaptedMethod:
    merge = Merge("constrained least squares", constraining(ConstrainedConfig()))
    return AdaptedMethod(
        "custom-diffusion", "Custom Diffusion", CUSTOM_DIFFUSION,
        {"constrained": merge, "sum": SUM}, partial(FullTraining, random_first=RANDOM_FIRST),
        modifier=True,
    )  # fmt: skip


def _mix_of_show(name: str, title: str, layerwise: bool) -> AdaptedMethod:
    merges = {
        "fusion": Merge("gradient fusion", fusing(FusionConfig())),
        "fusion-early": Merge("gradient fusion, stopped early", fusing(STOPPED_EARLY)),
        **AVERAGED,
    }
    opened = partial(_low_rank, layerwise=layerwise, random_first=RANDOM_FIRST)
    return AdaptedMethod(name, title, MIX_OF_SHOW, merges, opened)


def _orthogonal() -> AdaptedMethod:
    return AdaptedMethod(
        "orthogonal", "Orthogonal Adaptation", ORTHOGONAL, {"sum-0.6": SUM_06, "sum": SUM},
        partial(_low_rank, layerwise=True, random_first=RANDOM_FIRST, down="basis"),
        frozen=["down"], by_slot=True,
    )  # fmt: skip


_ALL: tuple[Method[Any], ...] = (
    Sbora("sbora-fa", "SBoRA-FA", SBORA_FA, FOLDED),
    Sbora("sbora-fb", "SBoRA-FB", SBORA_FB, FOLDED),
    Sbora("sbora", "SBoRA, calibrated", SBORA, CALIBRATED),
    AdaptedMethod("lora", "LoRA", LORA, AVERAGED, _low_rank),
    AdaptedMethod("dora", "DoRA", DORA, AVERAGED, MagnitudeTraining),
    AdaptedMethod(
        "lora-fa", "LoRA-FA", LORA_FA, AVERAGED, partial(_low_rank, down="frozen"), ["down"]
    ),
    _orthogonal(),
    _mix_of_show("mix-of-show", "Mix-of-Show", layerwise=True),
    _mix_of_show("mix-of-show-plain", "Mix-of-Show, plain tokens", layerwise=False),
    _custom_diffusion(),
    AdaptedMethod(
        "textual-inversion", "Textual Inversion", TEXTUAL_INVERSION, {"sum": SUM}, WordTraining
    ),
    ClassWord("class-word", "class word", TEXTUAL_INVERSION, {"sum": SUM}, WordTraining),
    Sbora("sbora-fa-same", "SBoRA-FA, same indices", SBORA_FA, OVERLAPPING, "same"),
    Sbora("sbora-fa-random", "SBoRA-FA, random indices", SBORA_FA, OVERLAPPING, "random"),
    Sbora("sbora-fb-same", "SBoRA-FB, same indices", SBORA_FB, OVERLAPPING, "same"),
    Sbora("sbora-fb-random", "SBoRA-FB, random indices", SBORA_FB, OVERLAPPING, "random"),
)
METHODS: dict[str, Method[Any]] = {method.name: method for method in _ALL}
"""Name → method, the controls last."""
