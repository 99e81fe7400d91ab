"""From kept pictures to the record: read, crop, judge, name the worst pairs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pair_study.crops import WAYS, calibration, halves, squares
from pair_study.judging import (
    THRESHOLD,
    figures,
    labels_of,
    margins,
    per_pair,
    to_concepts,
)
from pair_study.plan import CONDITIONS, LEFT, PROMPTS, RIGHT, Pair, all_pairs
from sbora_diffusion.alignment import Judges
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.evaluation.features import ImageFeatures

SHARED = ("condition", "method", "regions", "base_key", "steps", "guidance", "training")
JUDGED_FOR_GOAL = "sbora-regions"
WORST = 8


@dataclass(frozen=True)
class Drawn:
    """One condition's pictures, those of a pair together, pairs sorted."""

    settings: Mapping[str, Any]
    pairs: list[Pair]
    orders: list[Pair]
    files: list[Path]


def read_drawn(folder: Path, condition: str) -> Drawn:
    """What `PairDrawer.keep` wrote, all with the same settings."""
    records = [json.loads(file.read_text()) for file in sorted((folder / condition).glob("*.json"))]
    if not records:
        raise SystemExit(f"there are no pictures in {folder / condition}: draw them first")
    records.sort(key=lambda record: record["pair"])
    settings = [{key: record[key] for key in SHARED} for record in records]
    if odd := [r["pair"] for r, s in zip(records, settings, strict=True) if s != settings[0]]:
        raise SystemExit(f"{condition}: {odd[0]} was drawn with other settings than the first pair")
    pictures = [picture for record in records for picture in record["pictures"]]
    return Drawn(
        settings[0],
        [tuple(record["pair"]) for record in records],
        [tuple(picture["order"]) for picture in pictures],
        [folder / condition / picture["file"] for picture in pictures],
    )


class PairJudge:
    """Judges with the references of all concepts, and the way of cropping that suits them best."""

    def __init__(self, judges: Judges, subjects: Sequence[Subject], seed: int):
        self.judges: list[ImageFeatures] = [judges.clip, *judges.further]
        self.seed = seed
        self.names = [subject.settings.name for subject in subjects]
        self.categories = {s.settings.name: s.settings.category for s in subjects}
        self.pictures = {s.settings.name: [open_image(p) for p in s.images] for s in subjects}
        self.references = {
            judge.name: [judge.images(self.pictures[name]) for name in self.names]
            for judge in self.judges
        }

    def means(
        self,
        judge: ImageFeatures,
        pictures: Sequence[Image.Image],
        way: str,
        left_out: np.ndarray | None = None,
    ) -> np.ndarray:
        """(two crops of each picture, concepts); see `to_concepts`.

        Of several squares of a crop each concept gets the one that is most like it.
        """
        crops = [squares(half, way) for picture in pictures for half in halves(picture)]
        each = len(crops[0])
        features = judge.images([square for crop in crops for square in crop])
        excluded = None if left_out is None else left_out.repeat(each, 0)
        means = to_concepts(features, self.references[judge.name], excluded)
        return means.reshape(len(crops), each, -1).max(1)

    def right(
        self,
        judge: ImageFeatures,
        pictures: Sequence[Image.Image],
        way: str,
        labels: np.ndarray,
        left_out: np.ndarray | None = None,
    ) -> float:
        """Share of the crops that are nearer to their own concept."""
        means = self.means(judge, pictures, way, left_out)
        return round(float((margins(means, labels) > 0).mean()), 4)

    @cached_property
    def calibration(self) -> dict[str, dict[str, float]]:
        """Judge → way of cropping → share that is right where references themselves were pasted;
        the pasted references do not count as references."""
        rng = np.random.default_rng(self.seed)
        known = calibration(all_pairs(self.names), self.pictures, rng)
        labels = labels_of([k.order for k in known], self.names)
        left_out = np.full((2 * len(known), len(self.names)), -1)
        for row, case in enumerate(known):
            for name, number in zip(case.order, case.shown, strict=True):
                left_out[2 * row : 2 * row + 2, self.names.index(name)] = number
        pictures = [case.picture for case in known]

        return {
            judge.name: {way: self.right(judge, pictures, way, labels, left_out) for way in WAYS}
            for judge in self.judges
        }

    @property
    def way(self) -> str:
        """The way of cropping that is right most often, on the mean of the judges."""
        shares = self.calibration.values()
        return max(WAYS, key=lambda way: sum(share[way] for share in shares))

    def within(self, pairs: Sequence[Pair]) -> np.ndarray:
        return np.array([self.categories[a] == self.categories[b] for a, b in pairs])

    def condition(self, drawn: Drawn, condition: str) -> "Judged":
        """All figures of one condition, under every judge."""
        pictures = [open_image(file) for file in drawn.files]
        labels, within = labels_of(drawn.orders, self.names), self.within(drawn.pairs)
        goal = THRESHOLD if condition == JUDGED_FOR_GOAL else None
        found, shares, margin = {}, {}, {}
        for judge in self.judges:
            means = self.means(judge, pictures, self.way)
            found[judge.name] = figures(means, labels, within, self.seed, goal)
            each = margins(means, labels)
            shares[judge.name] = per_pair(each > 0, len(within))
            margin[judge.name] = per_pair(each, len(within))
        found[self.judges[0].name]["by_way_of_cropping"] = {
            way: self.right(self.judges[0], pictures, way, labels) for way in WAYS
        }
        return Judged(drawn, found, shares, margin)


@dataclass(frozen=True)
class Judged:
    """One condition's figures.

    Attributes:
        shares, margins: judge → (pairs,).
    """

    drawn: Drawn
    figures: dict[str, Any]
    shares: dict[str, np.ndarray]
    margins: dict[str, np.ndarray]

    def worst_first(self, judge: str) -> list[int]:
        """Numbers of the pairs, by share and then by margin."""
        return list(np.lexsort((self.margins[judge], self.shares[judge])))


def record(judge: PairJudge, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """The sections of the record."""
    first = next(iter(judged.values())).drawn
    within = judge.within(first.pairs)
    names = [j.name for j in judge.judges]
    ceiling = {name: shares[judge.way] for name, shares in judge.calibration.items()}
    return {
        "pictures": {
            "pairs": len(first.pairs),
            "pairs_within_one_category": int(within.sum()),
            "of_each_pair": len(first.files) // len(first.pairs),
            "prompts": list(PROMPTS),
            "boxes": [list(astuple(box)) for box in (LEFT, RIGHT)],
            **{key: first.settings[key] for key in ("base_key", "steps", "guidance")},
        },
        "training": {
            j.drawn.settings["method"]: j.drawn.settings["training"] for j in judged.values()
        },
        "crops": {"way": judge.way, "ceiling": ceiling, "calibration": judge.calibration},
        "conditions": {
            name: {condition: j.figures[name] for condition, j in judged.items()} for name in names
        },
        "worst_pairs": {c: _worst(j, names[0]) for c, j in judged.items()},
        "each_pair": [
            {
                "pair": list(pair),
                "within_one_category": bool(within[k]),
                **{c: [round(float(j.shares[n][k]), 3) for n in names] for c, j in judged.items()},
            }
            for k, pair in enumerate(first.pairs)
        ],
    }


def judge_all(judge: PairJudge, folder: Path) -> dict[str, Judged]:
    """Every condition that was drawn; all must have the same pairs."""
    drawn = {c: read_drawn(folder, c) for c in CONDITIONS if (folder / c).is_dir()}
    if not drawn:
        raise SystemExit(f"{folder} holds no condition's pictures: draw them first")
    first = next(iter(drawn.values()))
    for condition, found in drawn.items():
        if found.pairs != first.pairs or found.orders != first.orders:
            raise SystemExit(f"{condition} has other pairs than {first.settings['condition']}")
    return {condition: judge.condition(found, condition) for condition, found in drawn.items()}


def _worst(judged: Judged, judge: str) -> list[dict[str, Any]]:
    return [
        {
            "pair": list(judged.drawn.pairs[k]),
            "value": round(float(judged.shares[judge][k]), 4),
            "margin": round(float(judged.margins[judge][k]), 4),
        }
        for k in judged.worst_first(judge)[:WORST]
    ]
