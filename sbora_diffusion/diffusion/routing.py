"""Routing: a prompt activates the concepts whose tokens stand in it, out of any number."""

import difflib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from PIL import Image

from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import ConflictError
from sbora_diffusion.core.folded_set import Weighted
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import AT_ONCE, DEFAULT_STEPS, StepCallback, draw
from sbora_diffusion.diffusion.prompts import tokens_in

KEPT = 64
"""Concepts that stay in memory once they were read."""


Group = tuple[list[Weighted] | None, list[int]]
"""Concepts and the numbers of their prompts; no concepts: each prompt has its own."""


@dataclass(frozen=True)
class Source:
    """A concept that a prompt can call; `read` is called when one does.

    Attributes:
        place: says which concept it is where two have one token, e.g. its file.
    """

    name: str
    token: str
    place: str
    read: Callable[[], Concept]


class Holder(Protocol):
    """What can make any set of concepts the active one: `ConceptPipeline` or `Merged`."""

    base: Base

    def switch(self, concepts: Sequence[Weighted]) -> Any: ...


class Router:
    """Makes exactly those concepts active that a prompt names.

    Capacity limits only what is active together: concepts that share indices may be known, and are
    refused when one prompt names both. `Merged` as the holder costs nothing while drawing, and
    switching costs what the owned rows and columns cost; `ConceptPipeline` keeps live adapters,
    which regions need.

    Args:
        holder: has the base, and makes sets of concepts active.
        sources: what prompts can call.
        always: concepts that are active in every prompt, with their weights.
    """

    def __init__(self, holder: Holder, sources: Sequence[Source], always: Sequence[Weighted] = ()):
        self.holder, self.always = holder, list(always)
        taken = {entry.token for concept, _ in always for entry in concept.meta.tokens}
        self._sources: dict[str, list[Source]] = defaultdict(list)
        for source in sources:
            if source.token not in taken:
                self._sources[source.token].append(source)
        self._known = sorted({*self._sources, *taken})
        self._read = lru_cache(KEPT)(lambda source: source.read())

    def called(self, prompt: str) -> list[Source]:
        """The concepts that a prompt names, in its order, without reading them.

        Raises:
            ConflictError: a token belongs to two concepts.
        """
        found = [self._sources[token] for token in tokens_in(prompt) if token in self._sources]
        for first, *others in found:
            if others:
                raise ConflictError(
                    f"{first.token} is the token of {first.place} and of {others[0].place}",
                    "give the one that is meant with --concept, or rename a token",
                )
        return [sources[0] for sources in found]

    def concepts_for(self, prompt: str, allow_overlap: bool = False) -> list[Weighted]:
        """What is to be active for a prompt, with weights.

        Raises:
            ConflictError: two of them cannot be active together; names what they share.
            SboraError: a file cannot be read.
        """
        concepts = [*self.always, *((self._read(source), 1.0) for source in self.called(prompt))]
        check_mergeable([concept for concept, _ in concepts], allow_overlap)
        return concepts

    def unknown(self, prompt: str) -> dict[str, str | None]:
        """Tokens in a prompt that neither a concept nor the base knows, and for each the known one
        that is written most like it."""
        tokens = [token for token in tokens_in(prompt) if token not in self._known]
        words = self.holder.base.pipeline.tokenizer.get_vocab() if tokens else {}
        return {
            token: next(iter(difflib.get_close_matches(token, self._known, 1)), None)
            for token in tokens
            if token not in words
        }

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = DEFAULT_STEPS,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """One picture per prompt and seed, in the order given.

        Concepts with many prompts are drawn set by set, which costs least; the prompts of the
        others share their batches (see `mixed.MixedSampler`).

        Args:
            on_step: called with (groups done, groups in all).
            options: see `draw`; with a sampler of its own nothing is mixed.

        Raises:
            SboraError: a prompt's concepts cannot be active together; nothing was drawn.
        """
        mixable = "sampler" not in options and not tokens_in(options.get("negative_prompt", ""))
        groups = _pooled(self._groups(prompts)) if mixable else self._groups(prompts)
        pictures: dict[int, Image.Image] = {}
        for number, (concepts, rows) in enumerate(groups, 1):
            self.holder.switch(concepts or [])
            if concepts is None:
                options["sampler"] = MixedSampler(self.concepts_for)
            drawn = draw(
                self.holder.base,
                [prompts[k] for k in rows],
                [seeds[k] for k in rows],
                steps,
                **options,
            )
            pictures |= zip(rows, drawn, strict=True)
            if on_step:
                on_step(number, len(groups))
        return [pictures[k] for k in range(len(prompts))]

    def _groups(self, prompts: Sequence[str]) -> list[Group]:
        """Sets of concepts, each with the numbers of its prompts."""
        groups: dict[frozenset[Source], Group] = {}
        for k, prompt in enumerate(prompts):
            names = frozenset(self.called(prompt))
            if names not in groups:
                groups[names] = (self.concepts_for(prompt), [])
            groups[names][1].append(k)
        return list(groups.values())


def _pooled(groups: list[Group]) -> list[Group]:
    """The groups that do not fill a batch as one, where there are several."""
    small = [rows for _, rows in groups if len(rows) < AT_ONCE]
    if len(small) < 2:
        return groups
    full: list[Group] = [group for group in groups if len(group[1]) >= AT_ONCE]
    return [*full, (None, sorted(k for rows in small for k in rows))]
