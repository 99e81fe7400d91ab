"""How well ready-made pictures follow their texts and resemble references, as judges see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.dino import DinoFeatures
from sbora_diffusion.evaluation.features import (
    HUB,
    LOCAL,
    ClipFeatures,
    EfficientNetFeatures,
    ImageFeatures,
)
from sbora_diffusion.evaluation.protocols import RAW_COSINE, Protocol

Features = Mapping[str, Tensor]
"""Name of the image features → those of N pictures, (N, D)."""


@dataclass(frozen=True)
class Judges:
    """A CLIP model for texts and pictures, and further features of pictures alone."""

    clip: ClipFeatures
    further: tuple[ImageFeatures, ...] = ()

    def features(self, pictures: Sequence[Image.Image]) -> Features:
        """What scores are computed of; references' are computed once for many calls."""
        return {judge.name: judge.images(pictures) for judge in (self.clip, *self.further)}


@dataclass(frozen=True)
class Scores:
    """Of N pictures, each.

    Attributes:
        text: (N,), NaN for pictures without a text.
        image: name of the figure, which begins with that of the features → (N,); empty without
            references.
    """

    text: Tensor
    image: Mapping[str, Tensor]

    def part(self, rows: slice) -> "Scores":
        return Scores(self.text[rows], {name: values[rows] for name, values in self.image.items()})

    def means(self) -> dict[str, Any]:
        """As records hold it; the text alignment is None if no picture has a text."""
        known = self.text[~self.text.isnan()]
        return {
            "pictures": len(self.text),
            "text_alignment": round(known.mean().item(), 4) if len(known) else None,
            "image_alignment": {k: round(v.mean().item(), 4) for k, v in self.image.items()},
        }


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of pictures that were judged a few at a time, in one."""
    image = {name: torch.cat([part.image[name] for part in parts]) for name in parts[0].image}
    return Scores(torch.cat([part.text for part in parts]), image)


def load_judges(clip: str = "pocket-clip", device: str = "cpu", dino: str | None = None) -> Judges:
    """The judges that are installed, and DINO if its weights are given.

    Args:
        clip: MODEL[:PRETRAINED], see `ClipFeatures.load`.
        dino: see `DinoFeatures.load`.

    Raises:
        ConfigError, FormatError, ResourceError: see `ClipFeatures.load` and `DinoFeatures.load`.
    """
    model, pretrained = _split_model(clip)
    further: list[ImageFeatures] = [DinoFeatures.load(dino, device)] if dino else []
    if EfficientNetFeatures.installed():
        further.append(EfficientNetFeatures.load(device))
    return Judges(ClipFeatures.load(model, pretrained, device), tuple(further))


def _split_model(spec: str) -> tuple[str, str | None]:
    if spec.startswith((LOCAL, HUB)):
        return spec, None
    model, _, pretrained = spec.partition(":")
    return model, pretrained or None


def score(
    judges: Judges,
    pictures: Sequence[Image.Image],
    texts: Sequence[str | None],
    references: Features | None = None,
    protocol: Protocol = RAW_COSINE,
) -> Scores:
    """Score pictures, however they were made.

    Args:
        texts: what each picture should show, with plain words instead of placeholder tokens; None
            where nobody knows.
        references: from `Judges.features`; without them there is no image alignment.
    """
    assert len(pictures) == len(texts), (len(pictures), len(texts))
    asked = judges if references is not None else Judges(judges.clip)
    features = asked.features(pictures)
    seen = features[judges.clip.name]
    known = [k for k, text in enumerate(texts) if text is not None]
    text_scores = torch.full((len(pictures),), torch.nan)
    written = judges.clip.texts([protocol.prefix + text for text in texts if text is not None])
    text_scores[known] = protocol.text_alignment(seen[known], written)
    return Scores(text_scores, image_scores(features, references or {}, protocol))


def image_scores(
    features: Features, references: Features, protocol: Protocol = RAW_COSINE
) -> dict[str, Tensor]:
    """Name of the figure → (N,): pictures against references, in each of the references' features.

    Args:
        features: those of the N pictures.
    """
    found: dict[str, Tensor] = {}
    for name, others in references.items():
        found |= protocol.image_alignments(name, features[name], others)
    return found


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What changed between two `Scores.means()` that have the same figures."""
    images = before["image_alignment"]
    return {
        "text_alignment": round(after["text_alignment"] - before["text_alignment"], 4),
        "image_alignment": {k: round(after["image_alignment"][k] - images[k], 4) for k in images},
    }


def figures(means: Mapping[str, Any], signed: bool = False) -> dict[str, str]:
    """Figures by name, as tables show them."""
    values = {"text alignment": means["text_alignment"]}
    values |= {f"image alignment, {name}": v for name, v in means["image_alignment"].items()}
    form = "{:+.3f}" if signed else "{:.3f}"
    return {name: form.format(value) for name, value in values.items() if value is not None}
