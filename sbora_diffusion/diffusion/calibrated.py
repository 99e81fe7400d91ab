"""A merged model whose concepts do not disturb each other: folded after a closed-form fit, which
a descent may refine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.core.calibration import calibrated_concepts
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.core.prediction import Forecast, forecast
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import (
    CalibrateConfig,
    generic_moments,
    generic_steps,
    own_moments,
    own_steps,
)
from sbora_diffusion.diffusion.pipeline import StepCallback
from sbora_diffusion.diffusion.predictions import (
    Predictions,
    generic_prediction_steps,
    generic_predictions,
    joined,
    own_prediction_steps,
    own_predictions,
)
from sbora_diffusion.diffusion.refinement import refined_concepts
from sbora_diffusion.diffusion.targets import target_layers


class Calibrated(Merged):
    """Concepts folded in place, calibrated to each other; see `core/calibration.py`.

    Each concept is drawn alone and the base without any, then all entries that the concepts own are
    fitted together, and trained further if `config.refine` asks for it (`refinement`). What was
    measured is kept, so that a change of the set draws only for concepts, or weights λ, that are
    new; fit and refinement are those of the new set. As in `Merged` the order of the concepts does
    not matter, and without concepts the base is itself, bit for bit.

    Args:
        base: unfolded and without adapters.
        concepts: concepts with their weights λ.
        config: what is drawn, and how it counts.
        allow_overlap: accept concepts of one variant that share indices.
        on_step: called with (steps done, in all): of drawing, a batch's each, and of refinement.

    Raises:
        As `switch` does.
    """

    def __init__(
        self,
        base: Base,
        concepts: Sequence[Weighted] = (),
        config: CalibrateConfig | None = None,
        allow_overlap: bool = False,
        on_step: StepCallback | None = None,
    ) -> None:
        self.config = config or CalibrateConfig()
        self._on_step = on_step
        self._given: list[Weighted] = []
        self._own: dict[tuple[str, float], dict[str, Tensor]] = {}
        self._generic: dict[str, Tensor] | None = None
        self._heard: dict[tuple[str, float] | None, Predictions] = {}  # None: of the base
        super().__init__(base, concepts, allow_overlap)

    @property
    def concepts(self) -> list[Weighted]:
        """What is folded now, as it was given, in the order of the digests."""
        return self._given

    def switch(self, concepts: Sequence[Weighted]) -> None:
        """Go to another set of concepts; all that `Merged` refuses is refused before any drawing.

        Raises:
            NonFiniteError: also if a picture, or the fit, is not finite.
            And as `Merged.switch`. On any error nothing is changed.
        """
        relations = self._checked(concepts)
        before = self._folded.concepts
        louder = self._louder(concepts)
        try:
            self._fold(louder)
            fitted = self._fitted(louder)
            if self.config.refine:
                fitted = self._refined(concepts, fitted)
            self._fold([(copy, 1.0) for copy in fitted])
        except BaseException:
            self._fold(before)
            raise
        self._relations = relations
        self._given = sorted(concepts, key=lambda pair: pair[0].meta.digest)

    def forecast(self, concepts: Sequence[Weighted], names: Sequence[str]) -> Forecast:
        """What these concepts will be in one model, calibrated or added, before they are merged.

        Refuses and draws as `switch` does, which then has nothing to draw for the same set. The
        present set is folded again.

        Args:
            names: what the concepts are called in the result; unlike their own, they must differ.

        Raises:
            As `switch` does. The base is as before then, too.
        """
        self._checked(concepts)
        before = self._folded.concepts
        louder = self._louder(concepts)
        try:
            self._fold(louder)
            fitted = self._fitted(louder)
            self._fold([])
            return self._forecast(concepts, names, fitted)
        finally:
            self._fold(before)

    def _forecast(
        self, concepts: Sequence[Weighted], names: Sequence[str], fitted: Sequence[Concept]
    ) -> Forecast:
        """From what was measured, with the base bare."""
        assert self._generic is not None
        layers = target_layers(self.base.pipeline)
        bare = {name: layer.weight for name, layer in layers.items()}
        own = self._own_of(self._louder(concepts))
        return forecast(names, concepts, fitted, own, self._generic, bare)

    def _louder(self, concepts: Sequence[Weighted]) -> list[Weighted]:
        """With the weights that are fitted and drawn."""
        return [(concept, weight * self.config.gain) for concept, weight in concepts]

    def _own_of(self, concepts: Sequence[Weighted]) -> dict[str, dict[str, Tensor]]:
        """Digest to what the concept alone gave, with its weight."""
        return {c.meta.digest: self._own[c.meta.digest, weight] for c, weight in concepts}

    def _fitted(self, concepts: Sequence[Weighted]) -> list[Concept]:
        if not concepts:
            return []
        self._measure(concepts)
        assert self._generic is not None
        silence = self.config.generic_weight * len(concepts)
        own, generic = self._own_of(concepts), self._generic
        return calibrated_concepts(concepts, own, generic, silence, self.config.ridge)

    def _measure(self, concepts: Sequence[Weighted]) -> None:
        """Draw what has not been drawn yet; leaves the base bare or with one of them."""
        new = [pair for pair in concepts if _key(pair) not in self._own]
        rest = generic_steps(self.base, self.config) if self._generic is None else 0
        progress = _Progress(self._on_step, len(new) * own_steps(self.base, self.config) + rest)
        for pair in new:
            self._fold([pair])
            found = own_moments(self.base, pair[0], self.config, progress.part())
            self._own[_key(pair)] = found
        if self._generic is None:
            self._fold([])
            self._generic = generic_moments(self.base, self.config, progress.part())

    def _refined(self, concepts: Sequence[Weighted], fitted: Sequence[Concept]) -> list[Concept]:
        """What the fit becomes by learning what each concept alone predicts."""
        if not concepts:
            return []
        new = [pair for pair in concepts if _key(pair) not in self._heard]
        rest = 0 if None in self._heard else generic_prediction_steps(self.base, self.config)
        steps = len(new) * own_prediction_steps(self.base, self.config) + rest + self.config.refine
        progress = _Progress(self._on_step, steps)
        for pair in new:
            self._fold([pair])
            found = own_predictions(self.base, pair[0], self.config, progress.part())
            self._heard[_key(pair)] = found
        if None not in self._heard:
            self._fold([])
            self._heard[None] = generic_predictions(self.base, self.config, progress.part())
        # Of weight 0: the base's own entries, with the tokens of all.
        self._fold([(copy, 0.0) for copy in fitted])
        ordered = sorted(concepts, key=lambda pair: pair[0].meta.digest)
        heard = joined([*(self._heard[_key(pair)] for pair in ordered), self._heard[None]])
        return refined_concepts(self.base, fitted, heard, self.config, progress.part())

    def _record(self, dtype: torch.dtype) -> dict[str, Any]:
        return {**super()._record(dtype), "calibration": self.config.model_dump(mode="json")}


def _key(pair: Weighted) -> tuple[str, float]:
    concept, weight = pair
    return concept.meta.digest, weight


class _Progress:
    """Steps of several parts of a work, reported as steps of the whole."""

    def __init__(self, on_step: StepCallback | None, total: int) -> None:
        self._on_step, self._total, self._done = on_step, total, 0

    def part(self) -> Callable[[int], None]:
        """What the next part reports its own steps to; the parts before it are done."""
        before = self._done

        def report(done: int) -> None:
            self._done = before + done
            if self._on_step:
                self._on_step(self._done, self._total)

        return report
