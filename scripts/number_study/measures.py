"""What concepts are worth in models of a growing number of them."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from crosstalk_study.measures import Measures
from crosstalk_study.plan import Merge

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.baselines.adapted import Adapted
from sbora_diffusion.diffusion.baselines.edited import Summed
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig

Figures = dict[str, dict[str, float]]
"""Subject → figures."""
Trained = Sequence[Concept] | Sequence[Adapted]


class Model(Protocol):
    """What concepts are merged in."""

    def switch(self, concepts: Sequence[Any]) -> None: ...

    def restore(self) -> None: ...


class Divisible(Measures):
    """Measures of which a part of the subjects can be had."""

    def part(self, numbers: Sequence[int]) -> "Divisible":
        """The same of some subjects alone, by their numbers."""
        part = copy.copy(self)
        part.subjects = [self.subjects[number] for number in numbers]
        part._references = [self._references[number] for number in numbers]
        return part


def model_of(base: Base, trained: Trained, how: Merge) -> Model:
    """An empty model for these concepts."""
    if isinstance(trained[0], Adapted):
        return Summed(base)
    if how.calibration is None:
        return Merged(base)
    return Calibrated(base, config=CalibrateConfig.model_validate(how.calibration))


def alone(measures: Divisible, trained: Trained) -> Figures:
    """Subject → figures, each drawn by a model with its concept alone, as it was trained."""
    model = model_of(measures.base, trained, Merge())
    found: Figures = {}
    for k, concept in enumerate(trained):
        model.switch([(concept, 1.0)])
        found |= measures.part([k]).merged()
    model.restore()
    return found


def curve(
    measures: Divisible,
    trained: Trained,
    how: Merge,
    counts: Sequence[int],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The first n concepts in one model, for each n."""
    model, found = model_of(measures.base, trained, how), []
    for count in counts:
        weight = 1 / count if how.weight is None else how.weight
        chosen = [(concept, weight) for concept in trained[:count]]
        found.append({"concepts": count, **_point(measures.part(range(count)), model, chosen)})
        say(f"{count} concepts")
    model.restore()
    return found


def _point(measures: Divisible, model: Model, chosen: Sequence[Any]) -> Mapping[str, Any]:
    """Seconds of merging and each subject's figures; what is broken instead, if a picture is."""
    began = time.monotonic()
    try:
        model.switch(chosen)
        seconds = time.monotonic() - began
        return {"seconds": round(seconds, 2), "each": measures.merged()}
    except NonFiniteError as error:
        return {"seconds": None, "each": None, "broken": error.problem}
