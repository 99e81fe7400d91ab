"""What pictures of concepts are worth: the twenty prompts drawn in large batches, and judged."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sbora_diffusion.alignment import Features, Judges, Scores, image_scores
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.pipeline import decode, draw_latents
from sbora_diffusion.evaluate import read_pictures
from sbora_diffusion.evaluation.prompt_sets import GROUPS, PromptFile, PromptSet
from sbora_diffusion.evaluation.protocols import RAW_COSINE, Protocol
from sbora_diffusion.pictures import save_png

Figures = dict[str, Any]
"""Protocol → `Scores.means()`; under "groups" raw cosines by group of prompts."""


class Measures:
    """Draws and judges concepts by what the base is at the time.

    Args:
        subjects: name → subject; each one's references are read.
        drawing: see `Preset.drawing`.
        at_once: pictures in a batch.
        by_group: whether figures tell the groups of prompts apart, too.

    Raises:
        DataError: a picture cannot be read.
        ConfigError: there are no prompts for a subject.
    """

    def __init__(
        self,
        base: Base,
        judges: Judges,
        protocols: Sequence[Protocol],
        subjects: Mapping[str, Subject],
        prompts: PromptFile,
        drawing: Mapping[str, Any],
        at_once: int,
        by_group: bool = True,
    ):
        self.by_group = by_group
        self.base, self.judges, self.protocols = base, judges, protocols
        self.drawing, self.at_once = drawing, at_once
        self._prompts: dict[str, PromptSet] = {
            name: prompts.for_subject(subject.settings.category, subject.settings.class_noun)
            for name, subject in subjects.items()
        }
        self._texts = {
            (name, protocol.name): judges.clip.texts(_read(protocol, self._prompts[name], subject))
            for name, subject in subjects.items()
            for protocol in protocols
        }
        self._references: dict[str, Features] = {
            name: judges.features(read_pictures(subject.images[0].parent))
            for name, subject in subjects.items()
        }

    def figures(self, words: Mapping[str, str], keep: Path | None = None) -> dict[str, Figures]:
        """Concept → figures, all drawn by the base as it is now.

        Args:
            words: concept → what stands for it in a prompt.
            keep: a folder for the pictures, one inside it for each concept.

        Raises:
            NonFiniteError: a picture became NaN or infinite.
        """
        num = self.drawing["num"]
        prompts = [p for n, word in words.items() for p in self._repeated(self._prompts[n], word)]
        first = self.drawing["picture_seed"]
        seeds = [first + k % num for k in range(len(prompts))]
        pictures = list(drawn(self.base, prompts, seeds, self.drawing, self.at_once))
        each, found = len(pictures) // len(words), {}
        for k, name in enumerate(words):
            rows = slice(k * each, (k + 1) * each)
            if keep:
                _save(pictures[rows], prompts[rows], seeds[rows], keep / name)
            found[name] = self._judged(name, pictures[rows])
        return found

    def _repeated(self, prompts: PromptSet, words: str) -> list[str]:
        """Each prompt as often as it is drawn."""
        return [prompt for prompt in prompts.about(words) for _ in range(self.drawing["num"])]

    def _judged(self, name: str, pictures: Sequence[Image.Image]) -> Figures:
        references, clip = self._references[name], self.judges.clip.name
        features = self.judges.features(pictures)
        found: Figures = {}
        for protocol in self.protocols:
            texts = self._texts[name, protocol.name].repeat_interleave(self.drawing["num"], 0)
            text = protocol.text_alignment(features[clip], texts)
            scores = Scores(text, image_scores(features, references, protocol))
            found[protocol.name] = scores.means()
            if self.by_group and protocol is RAW_COSINE:
                size = len(texts) // len(GROUPS)
                parts = {g: slice(k * size, (k + 1) * size) for k, g in enumerate(GROUPS)}
                found["groups"] = {g: scores.part(rows).means() for g, rows in parts.items()}
        return found


def _read(protocol: Protocol, prompts: PromptSet, subject: Subject) -> list[str]:
    """The prompts as the judge reads them: about the class noun."""
    about = prompts.about(subject.settings.class_noun)
    return [protocol.prefix + protocol.plain(prompt, {}) for prompt in about]


def drawn(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], how: Mapping[str, Any], at_once: int
) -> Iterator[Image.Image]:
    """One picture for each prompt and seed.

    Batches are of nearly one size: on a GPU each size is recorded anew.

    Args:
        how: see `Preset.drawing`.
        at_once: the largest batch.

    Raises:
        NonFiniteError: a picture became NaN or infinite.
    """
    batches = -(-len(prompts) // at_once)
    size = -(-len(prompts) // batches)
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        latents = draw_latents(
            base, prompts[rows], seeds[rows], how["steps"], how["guidance"], how["negative_prompt"]
        )
        yield from decode(base, latents)


def _save(
    pictures: Sequence[Image.Image], prompts: Sequence[str], seeds: Sequence[int], folder: Path
) -> None:
    for k, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        save_png(picture, folder / f"{k:04d}.png", {"prompt": prompt, "seed": seed})


def worth(figures: Mapping[str, Any]) -> float:
    """Raw cosines in one number: text alignment and the mean of the image alignments."""
    means = figures[RAW_COSINE.name]
    images = means["image_alignment"].values()
    return means["text_alignment"] + sum(images) / len(images)
