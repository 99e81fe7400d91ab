"""What each concept of a merge will hear of the others, before anything is written.

Alone, concept p adds ΔW_p x to what a layer makes of its inputs x; in a merge whose update is D it
is D x. With G_p the second moment of x on p's own prompts, drawn with p alone, what the merge
changes in a layer is

    left = tr((D − ΔW_p) G_p (D − ΔW_p)ᵀ),

against tr(ΔW_p G_p ΔW_pᵀ), what the concept itself does there: 0 is nothing, 1 as much as itself.
It is the part of calibration's least squares (`core/calibration.py`) that is p's, and it holds for
a plain sum as well. That inputs of later layers change too is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.core.calibration import LayerMoments
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.crosstalk import Crosstalk, from_norms
from sbora_diffusion.core.energies import UpdateSum, weight_energies
from sbora_diffusion.core.layers import kind
from sbora_diffusion.core.shares import concept_updates
from sbora_diffusion.core.updates import Update

CALIBRATED, ADDED = "calibrated", "added"
"""The ways of merging."""

OfLayers = Mapping[str, Mapping[str, Update]]
"""Layer to digest to update."""


@dataclass(frozen=True, eq=False)
class Disturbance:
    """What one merge changes, for each of P concepts and in each of L layers; all fp64.

    Attributes:
        names: of the concepts.
        layers: canonical names.
        left: (P, L), tr((D − ΔW_p) G_p (D − ΔW_p)ᵀ).
        own: (P, L), tr(ΔW_p G_p ΔW_pᵀ); 0 where p does not adapt the layer.
        shared: (P, L), tr(D G_p ΔW_pᵀ); where D is ΔW_p it is `own`.
        whole: (P, L), tr(W0 G_p W0ᵀ), the layer's whole output.
        generic: (L,), tr(D G Dᵀ) on prompts without a concept.
        generic_whole: (L,), tr(W0 G W0ᵀ) on them.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    left: Tensor
    own: Tensor
    shared: Tensor
    whole: Tensor
    generic: Tensor
    generic_whole: Tensor

    def ratios(self) -> Tensor:
        """√(left / own), (P, L); NaN where p does nothing itself."""
        return _root_of_ratio(self.left, self.own)

    def rms(self) -> Tensor:
        """Root mean square of the ratios over the layers, (P,); NaN for a concept without any."""
        return _rms(self.ratios())

    def predictors(self) -> dict[str, Tensor]:
        """Single figures, (P,) each, by name.

        "rms" and "mean" over the layers' ratios; "energy": root of all layers' left over all
        layers' own; "whole": rms of the change over the whole output; "lost": how much of what the
        concept does itself is no more there, mean over the layers; "foreign": rms of the ratios in
        which only the part of D that is orthogonal to ΔW_p counts; then the rms of the ratios in
        "unet" and within each kind of layer.
        """
        ratios = self.ratios()
        unet = [number for number, layer in enumerate(self.layers) if layer.startswith("unet.")]
        return {
            "rms": _rms(ratios),
            "mean": ratios.nanmean(dim=1),
            "energy": _root_of_ratio(self.left.sum(1), self.own.sum(1)),
            "whole": _rms(_root_of_ratio(self.left, self.whole)),
            "lost": (1 - (self.shared / self.own).where(self.own > 0, torch.nan)).nanmean(dim=1),
            "foreign": _rms(_root_of_ratio(self._foreign(), self.own)),
            "unet": _rms(ratios[:, unet]),
            **self.grouped(kind),
        }

    def _foreign(self) -> Tensor:
        """The energy of D that is orthogonal to ΔW_p, (P, L)."""
        return (self.left - (self.own - self.shared).square() / self.own).clamp_min(0)

    def grouped(self, group_of: Callable[[str], str]) -> dict[str, Tensor]:
        """`rms` within each group of layers, by the groups' names in order."""
        groups: dict[str, list[int]] = {}
        for number, layer in enumerate(self.layers):
            groups.setdefault(group_of(layer), []).append(number)
        ratios = self.ratios()
        return {name: _rms(ratios[:, groups[name]]) for name in sorted(groups)}

    def of_generic(self) -> float:
        """Change over the whole output on prompts without a concept, rms over the layers."""
        return _rms(_root_of_ratio(self.generic, self.generic_whole)).item()


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a set of concepts will be in one model.

    Attributes:
        crosstalk: of every two concepts, each with its own update.
        ways: `CALIBRATED` and `ADDED`, with what each changes.
    """

    crosstalk: Crosstalk
    ways: Mapping[str, Disturbance]


def forecast(
    names: Sequence[str],
    concepts: Sequence[tuple[Concept, float]],
    calibrated: Sequence[Concept],
    own: Mapping[str, LayerMoments],
    generic: LayerMoments,
    weights: Mapping[str, Tensor],
) -> Forecast:
    """Predict a calibrated merge and a plain sum from second moments alone.

    Args:
        names: what the P concepts are called in the result; unlike their own, they must differ.
        concepts: with their weights λ; their digests differ.
        calibrated: their copies from `calibrated_concepts`.
        own: digest to the moments G_p that the concept alone gives.
        generic: the moments of the base alone.
        weights: layer to W0 (out, in).

    Raises:
        FormatError: a concept stores more than updates of weights.
    """
    plain, fitted = _by_layer(concepts), _by_layer([(copy, 1.0) for copy in calibrated])
    digests = [concept.meta.digest for concept, _ in concepts]
    crosstalk = _crosstalk(names, digests, plain, own)
    whole = [
        weight_energies(weights[layer], [generic[layer], *(own[d][layer] for d in digests)])
        for layer in crosstalk.layers
    ]
    ways = {
        way: _disturbance(crosstalk, digests, plain, merged, own, generic, whole)
        for way, merged in ((CALIBRATED, fitted), (ADDED, plain))
    }
    return Forecast(crosstalk, ways)


def _by_layer(concepts: Sequence[tuple[Concept, float]]) -> OfLayers:
    found: dict[str, dict[str, Update]] = {}
    for concept, weight in concepts:
        for layer, update in concept_updates(concept, weight).items():
            found.setdefault(layer, {})[concept.meta.digest] = update
    return found


def _crosstalk(
    names: Sequence[str],
    digests: Sequence[str],
    updates: OfLayers,
    own: Mapping[str, LayerMoments],
) -> Crosstalk:
    norms: list[dict[tuple[int, str], float]] = [{} for _ in digests]
    for layer, here in updates.items():
        for q, disturber in enumerate(digests):
            if disturber in here:
                alone = UpdateSum([here[disturber]])
                for p, digest in enumerate(digests):
                    norms[p][q, layer] = alone.energy(own[digest][layer]) ** 0.5
    return from_norms(names, norms)


def _disturbance(
    crosstalk: Crosstalk,
    digests: Sequence[str],
    plain: OfLayers,
    merged: OfLayers,
    own: Mapping[str, LayerMoments],
    generic: LayerMoments,
    whole: Sequence[Sequence[float]],
) -> Disturbance:
    itself = crosstalk.norms.diagonal(dim1=0, dim2=1).T.square().nan_to_num(0.0)  # (P, L)
    energy, shared = torch.zeros_like(itself), torch.zeros_like(itself)
    of_generic = []
    for number, layer in enumerate(crosstalk.layers):
        together = UpdateSum(list(merged[layer].values()))
        of_generic.append(together.energy(generic[layer]))
        for p, digest in enumerate(digests):
            moment, update = own[digest][layer], plain[layer].get(digest)
            energy[p, number] = together.energy(moment)
            shared[p, number] = together.inner(update, moment) if update else 0.0
    outputs = torch.tensor(whole, dtype=torch.float64)
    return Disturbance(
        crosstalk.names,
        crosstalk.layers,
        (energy - 2 * shared + itself).clamp_min(0),  # rounding may leave less than nothing
        itself,
        shared,
        outputs[:, 1:].T,
        torch.tensor(of_generic, dtype=torch.float64),
        outputs[:, 0],
    )


def _root_of_ratio(part: Tensor, whole: Tensor) -> Tensor:
    return (part / whole).where(whole > 0, torch.nan).sqrt()


def _rms(ratios: Tensor) -> Tensor:
    return ratios.square().nanmean(dim=-1).sqrt()
