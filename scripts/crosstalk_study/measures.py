"""What pictures of concepts, alone and in one model, are worth."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from crosstalk_study.plan import UNRELATED
from sbora_diffusion.alignment import Features, Judges, load_judges, score
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import decode, draw_latents, sample
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluate import PROMPTS, read_pictures
from sbora_diffusion.evaluation.features import LOCAL

AT_ONCE = 160
"""Pictures that are drawn in one batch."""
NOISE = 0.01
"""Of the initial latents' own spread: what silence on unrelated prompts is held against."""


@dataclass(frozen=True)
class Drawing:
    """How every picture is drawn."""

    num: int
    seed: int
    steps: int
    guidance: float


class Measures:
    """Judges the pictures of some subjects."""

    def __init__(self, base: Base, judges: Judges, subjects: Sequence[Subject], how: Drawing):
        self.base, self.judges, self.subjects, self.how = base, judges, subjects, how
        self._references: list[Features] = [
            judges.features(read_pictures(subject.images[0].parent)) for subject in subjects
        ]

    def of_class_words(self) -> dict[str, dict[str, float]]:
        """Subject → figures of its bare class word."""
        return self._figures(draw_latents, [_noun(subject) for subject in self.subjects])

    def alone(self, concepts: Sequence[Concept]) -> dict[str, dict[str, float]]:
        """Subject → figures, each drawn with its own concept."""
        by_token = {concept.meta.tokens[0].token: concept for concept in concepts}
        sampler = MixedSampler(
            lambda prompt: [
                (concept, 1.0) for token, concept in by_token.items() if token in prompt
            ]
        )
        return self._figures(sampler, [subject.settings.token for subject in self.subjects])

    def merged(self) -> dict[str, dict[str, float]]:
        """Subject → figures, drawn by the base as it is now."""
        return self._figures(draw_latents, [subject.settings.token for subject in self.subjects])

    def _figures(self, sampler: Any, words: Sequence[str]) -> dict[str, dict[str, float]]:
        how, each = self.how, len(PROMPTS) * self.how.num
        prompts = [p.format(word) for word in words for p in PROMPTS for _ in range(how.num)]
        seeds = [how.seed + k for _ in words for _ in PROMPTS for k in range(how.num)]
        pictures = list(self._pictures(sampler, prompts, seeds))
        return {
            subject.settings.name: self._judged(k, pictures[k * each : (k + 1) * each])
            for k, subject in enumerate(self.subjects)
        }

    def _judged(self, number: int, pictures: Sequence[Image.Image]) -> dict[str, float]:
        noun = _noun(self.subjects[number])
        texts = [p.format(noun) for p in PROMPTS for _ in range(self.how.num)]
        means = score(self.judges, pictures, texts, self._references[number]).means()
        return {"text_alignment": means["text_alignment"], **means["image_alignment"]}

    def _pictures(
        self, sampler: Any, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Image.Image]:
        for start in range(0, len(prompts), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            latents = sampler(
                self.base, prompts[rows], seeds[rows], self.how.steps, self.how.guidance, ""
            )
            yield from decode(self.base, latents)

    def unrelated(self, noise: float = 0.0) -> list[Image.Image]:
        """Pictures of prompts without a concept, by the base as it is now.

        Args:
            noise: standard deviation of what is added to the initial latents, theirs being 1.
        """
        seeds = [self.how.seed + k for k in range(len(UNRELATED))]
        texts = {"prompt": list(UNRELATED), "negative_prompt": [""] * len(UNRELATED)}
        latents = torch.stack([self._initial(seed, noise) for seed in seeds]).to(self.base.device)
        drawn = sample(
            self.base, {**texts, "latents": latents}, seeds, self.how.steps, self.how.guidance
        )
        return decode(self.base, drawn)

    def _initial(self, seed: int, noise: float) -> torch.Tensor:
        """(C, H, W), as the pipeline itself would draw it where there is no noise to add."""
        unet = self.base.pipeline.unet.config
        shape = unet.in_channels, unet.sample_size, unet.sample_size
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn((1, *shape), generator=generator)[0]
        return first + noise * torch.randn(shape, generator=generator) if noise else first

    def distance(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]
    ) -> Mapping[str, float]:
        """Mean 1 − cosine of pictures and their counterparts, by the name of the features."""
        found = {}
        for judge in (self.judges.clip, *self.judges.further):
            pairs = judge.images(list(pictures)), judge.images(list(others))
            cosine = torch.nn.functional.cosine_similarity(*pairs)
            found[judge.name] = round((1 - cosine).mean().item(), 5)
        return found

    def text_of_unrelated(self, pictures: Sequence[Image.Image]) -> float:
        """Text alignment of pictures that `unrelated` drew."""
        return score(self.judges, pictures, list(UNRELATED)).means()["text_alignment"]


M = TypeVar("M", bound=Measures)


def measures_of(args: argparse.Namespace, kind: type[M] = Measures) -> M:
    """Base, judges and subjects as a study's options name them, see `study_parser`."""
    judge = f"{LOCAL}{args.judge}" if Path(args.judge).is_dir() else args.judge
    subjects = [read_subject(args.concepts / name) for name in args.subjects]
    how = Drawing(args.num, args.seed, args.steps, args.guidance)
    base = load_base(args.base, args.device)
    return kind(base, load_judges(judge, args.device), subjects, how)


def _noun(subject: Subject) -> str:
    return with_article(subject.settings.class_noun)
