"""What the judge knows: retrieval on real composed scenes, and the committed references."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from pocket_evaluation.record import share
from pocket_evaluation.scenes import Subset, World, generator
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluation.features import ClipFeatures
from sbora_diffusion.evaluation.metrics import classify, recall_at_1, similarity
from sbora_diffusion.records import at_least

GROUP, GROUPS = 100, 20
SEEN, HELD_OUT = 0.90, 0.80


def judge_the_judge(
    world: World, clip: ClipFeatures, concepts: Path, seed: int, groups: int = GROUPS
) -> dict[str, Any]:
    """The section."""
    return {
        "judge": clip.name,
        "seed": seed,
        "recall_at_1_of_100": {
            name: recall(world, subset, clip, generator(seed, name), groups, threshold)
            for name, subset, threshold in (
                ("seen_subjects", world.seen(), SEEN),
                ("held_out_subjects", world.held_out(), HELD_OUT),
            )
        },
        "references": judge_references(clip, read_subjects(concepts)),
    }


def read_subjects(folder: Path) -> list[Subject]:
    """The concept folders in a folder, by name."""
    return [read_subject(file.parent) for file in sorted(folder.glob("*/concept.toml"))]


def recall(
    world: World,
    subset: Subset,
    clip: ClipFeatures,
    rng: Generator,
    groups: int,
    threshold: float,
) -> dict[str, Any]:
    """Image→text recall@1 among random captions of other scenes, the mean over groups."""
    found, twins = [], 0
    for _ in range(groups):
        plans = [subset.plan(rng) for _ in range(GROUP)]
        contents = [(frozenset(m.noun for m in plan.mentions), plan.scene) for plan in plans]
        twins += sum(contents.count(content) > 1 for content in contents)
        pictures = clip.images(world.compose(plans))
        found.append(recall_at_1(pictures, clip.texts([plan.caption for plan in plans])))
    return {
        **at_least(float(np.mean(found)), threshold),
        "standard_deviation_of_groups": round(float(np.std(found)), 4),
        "groups": groups,
        "nouns": len(subset.planner.nouns),
        "share_with_a_twin": round(twins / (groups * GROUP), 4),  # same nouns, same scene
    }


def judge_references(clip: ClipFeatures, subjects: list[Subject]) -> dict[str, Any]:
    """The committed references, which the judge never saw: are nouns and subjects told apart?"""
    pictures = [clip.images([open_image(p) for p in subject.images]) for subject in subjects]
    features = torch.cat(pictures)
    owner = torch.cat([torch.full((len(p),), k) for k, p in enumerate(pictures)])
    settings = [subject.settings for subject in subjects]
    nouns = [s.class_noun for s in settings]
    names = [f"{s.name} {s.class_noun}" for s in settings]
    return {
        "pictures": len(features),
        "concepts": len(subjects),
        "own_class_noun": share(picked(clip, features, owner, nouns)),
        "own_name": share(picked(clip, features, owner, names)),
        **cosines(features, owner),
    }


def picked(clip: ClipFeatures, features: Tensor, owner: Tensor, words: list[str]) -> list[bool]:
    """Whether each picture is nearest to its own words; equal words count as the same."""
    options = list(dict.fromkeys(words))
    texts = clip.texts([f"a photo of {with_article(option)}" for option in options])
    chosen = classify(features, texts).tolist()
    return [options[c] == words[k] for c, k in zip(chosen, owner.tolist(), strict=True)]


def cosines(features: Tensor, owner: Tensor) -> dict[str, float]:
    """Mean cosine of two pictures of one concept, and of two of different concepts."""
    values, same = similarity(features, features), owner[:, None] == owner[None]
    itself = torch.eye(len(owner), dtype=torch.bool)
    return {
        "mean_cosine_within_a_concept": round(values[same & ~itself].mean().item(), 4),
        "mean_cosine_between_concepts": round(values[~same].mean().item(), 4),
    }
