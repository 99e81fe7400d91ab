"""Draw every concept alone, merged with others and routed, each from the same seeds."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merging_study.archive import Archive
from merging_study.plan import (
    ALL,
    BASE,
    CLASS_WORD,
    ROUTED,
    SINGLE,
    UNRELATED,
    UNRELATED_PROMPTS,
    Three,
    numbered,
)
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import decode, draw_latents
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.diffusion.routing import Router, Source
from sbora_diffusion.evaluate import PROMPTS, EvaluateConfig


@dataclass
class MergingRun:
    """Pictures of some concepts, out of all that are merged.

    Args:
        base: unfolded; it is left as it was.
        concepts: all of them, by name.
        sets: the threes that are merged.
    """

    base: Base
    concepts: Mapping[str, Concept]
    sets: Sequence[Three]
    config: EvaluateConfig
    archive: Archive = field(default_factory=Archive)

    def __post_init__(self) -> None:
        self.archive.facts |= {"routing": {}, "merge_seconds": []}
        self.holder = Merged(self.base)
        sources = [self._source(concept) for concept in self.concepts.values()]
        self.router = Router(self.holder, sources)

    def draw(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        """All conditions of these concepts."""
        self.holder.switch(self._weighted(self.concepts))  # the first switch copies what it needs
        for name in names:
            token = self.concepts[name].meta.tokens[0].token
            self._keep(f"{CLASS_WORD}/{name}", self._plain(name))
            single = self._merged([name], token)
            self._keep(f"{SINGLE}/{name}", single)
            for three in self.sets:
                if name in three.concepts:
                    latents = self._merged(three.concepts, token)
                    self._keep(f"{three.kind}/{name}/{three.label}", latents)
            self._keep(f"{ALL}/{name}", self._merged(list(self.concepts), token))
            self._check_routing(name, token, single)
            say(f"{name}: {self.archive.facts['routing'][name]['equal']} routed as alone")

    def draw_unrelated(self) -> None:
        """Prompts that name no concept, before and after all are merged."""
        self.holder.restore()
        self._keep(f"{UNRELATED}/{BASE}", self._latents(UNRELATED_PROMPTS, len(UNRELATED_PROMPTS)))
        self._switch(list(self.concepts))
        self._keep(f"{UNRELATED}/{ALL}", self._latents(UNRELATED_PROMPTS, len(UNRELATED_PROMPTS)))

    def close(self) -> None:
        self.holder.restore()

    def _plain(self, name: str) -> Tensor:
        self.holder.restore()
        words = with_article(self.concepts[name].meta.class_noun)
        return self._latents(numbered(PROMPTS, words, self.config.num), self.config.num)

    def _merged(self, names: Sequence[str], token: str) -> Tensor:
        self._switch(names)
        return self._latents(numbered(PROMPTS, token, self.config.num), self.config.num)

    def _switch(self, names: Sequence[str]) -> None:
        """Fold into the bare base, and note how long that takes."""
        self.holder.restore()
        self._wait()
        began = time.perf_counter()
        self.holder.switch(self._weighted(names))
        self._wait()
        seconds = round(time.perf_counter() - began, 5)
        self.archive.facts["merge_seconds"].append({"concepts": len(names), "seconds": seconds})

    def _check_routing(self, name: str, token: str, single: Tensor) -> None:
        """A router that comes from all the others must draw what the concept draws alone."""
        prompts = numbered(PROMPTS, token, self.config.num)
        routed = torch.empty_like(single)
        for names, rows in self._groups(prompts).items():
            self.holder.switch(self._weighted(names))
            seeds = self._seeds(len(prompts), self.config.num)
            routed[rows] = self._sample([prompts[k] for k in rows], [seeds[k] for k in rows])
        equal = [torch.equal(a, b) for a, b in zip(routed, single, strict=True)]
        self.archive.facts["routing"][name] = {"equal": sum(equal), "of": len(equal)}
        if not all(equal):
            self._keep(f"{ROUTED}/{name}", routed)

    def _groups(self, prompts: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
        """Sets of concepts that the prompts call, each with the numbers of its prompts."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for k, prompt in enumerate(prompts):
            called = tuple(concept.meta.name for concept, _ in self.router.concepts_for(prompt))
            groups.setdefault(called, []).append(k)
        return groups

    def _latents(self, prompts: Sequence[str], num: int) -> Tensor:
        return self._sample(prompts, self._seeds(len(prompts), num))

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return draw_latents(self.base, prompts, seeds, self.config.steps, self.config.guidance)

    def _seeds(self, pictures: int, num: int) -> list[int]:
        """Picture k of every prompt starts from seed + k, as in `evaluate_concept`."""
        return [self.config.seed + k % num for k in range(pictures)]

    def _keep(self, group: str, latents: Tensor) -> None:
        self.archive.groups[group] = decode(self.base, latents)

    def _weighted(self, names: Any) -> list[tuple[Concept, float]]:
        return [(self.concepts[name], 1.0) for name in names]

    def _source(self, concept: Concept) -> Source:
        name = concept.meta.name
        return Source(name, concept.meta.tokens[0].token, name, lambda: concept)

    def _wait(self) -> None:
        if self.base.pipeline.device.type == "cuda":
            torch.cuda.synchronize()
