"""One set of concepts: what is predicted of its merges, and what they turn out to be."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from number_study.measures import Divisible, Model
from PIL import Image

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.prediction import ADDED, CALIBRATED, Disturbance
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig


class Merges:
    """Merges sets of some concepts in every way, one after the other, in one base.

    Args:
        measures: of the concepts' subjects, in the same order.
    """

    def __init__(
        self, measures: Divisible, concepts: Sequence[Concept], config: CalibrateConfig
    ) -> None:
        self.measures = measures
        self.concepts = {concept.meta.name: concept for concept in concepts}
        self._calibrated = Calibrated(measures.base, config=config)
        self._models: dict[str, Model] = {
            CALIBRATED: self._calibrated,
            ADDED: Merged(measures.base),
        }
        self._plain = measures.unrelated()

    def of(self, names: Sequence[str]) -> dict[str, Any]:
        """Way of merging → predictors and figures of each concept, and of unrelated prompts."""
        pairs = [(self.concepts[name], 1.0) for name in names]
        began = time.monotonic()
        ways = self._calibrated.forecast(pairs, names).ways
        found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 2)}
        part = self.measures.part([list(self.concepts).index(name) for name in names])
        for way, model in self._models.items():
            found[way] = {**_predicted(ways[way]), **self._measured(part, model, pairs)}
        return {"concepts": list(names), "ways": found}

    def _measured(self, part: Divisible, model: Model, pairs: Sequence[Any]) -> dict[str, Any]:
        try:
            model.switch(pairs)
            return {"each": part.merged(), "distance": self._distance(part.unrelated())}
        except NonFiniteError as error:  # a plain sum may end so; it has no figures then
            return {"each": None, "distance": None, "broken": error.problem}
        finally:
            model.restore()

    def _distance(self, pictures: Sequence[Image.Image]) -> Mapping[str, float]:
        return self.measures.distance(pictures, self._plain)


def _predicted(one: Disturbance) -> dict[str, Any]:
    figures = {name: values.tolist() for name, values in one.predictors().items()}
    return {
        "predictors": {
            concept: {name: values[p] for name, values in figures.items()}
            for p, concept in enumerate(one.names)
        },
        "generic": one.of_generic(),
    }
