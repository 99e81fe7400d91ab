"""What the app does without its page: the concepts to choose from, and one pipeline that draws."""

import math
import secrets
import shlex
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sbora_diffusion.cards import Card, find_cards, read_card
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.prompts import tokens_in
from sbora_diffusion.library import Library

if TYPE_CHECKING:  # torch and diffusers take seconds to import: only once they are needed
    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline

EXAMPLES = Path(__file__).parent / "pocket" / "examples"
MAX_IMAGES, MAX_STEPS, MAX_SEED, MAX_PROMPT = 8, 100, 2**31 - 1, 1000
MAX_WEIGHT = 1.5
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 4.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What one press of Generate asks for; `concepts` maps a card's key to a weight."""

    prompt: str
    concepts: Mapping[str, float]
    seed: int = -1  # -1: random
    num: int = 1
    steps: int = DEFAULT_STEPS
    guidance: float = DEFAULT_GUIDANCE
    negative_prompt: str = ""


@dataclass(frozen=True)
class Outcome:
    """Pictures as files, one seed each; the files live until the next request has begun."""

    files: list[Path]
    seeds: list[int]
    command: str
    warnings: list[str]


class Stopped(Exception):
    """The person who asked for the pictures does not want them any more."""


class Studio:
    """One pocket base, loaded when first needed, that serves one request at a time.

    Args:
        library: the user's library file, the default one if not given.
        examples: a folder of concept files that everybody sees.
    """

    def __init__(self, library: str | Path | None = None, examples: Path = EXAMPLES):
        self.library, self.examples = Library(library), examples
        self._lock = threading.Lock()
        self._pipeline: ConceptPipeline | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sbora-app-")

    def cards(self) -> tuple[list[Card], list[str]]:
        """The concepts that can be chosen now, and what is wrong with those that cannot."""
        return find_cards(self.library, self.examples)

    def load(self) -> "ConceptPipeline":
        """The pipeline; the first call imports and reads the base, some seconds."""
        with self._lock:
            return self._loaded()

    def draw(self, request: Request, on_step: Progress, stop: threading.Event) -> Outcome:
        """Draw the pictures; equal requests give equal pixels, whatever was drawn before.

        Raises:
            SboraError: the request makes no sense, or its concepts cannot be used together.
            Stopped: `stop` was set.
        """
        request = _checked(request)
        cards = self._chosen(request)
        with self._lock:
            self._raise_if_stopped(stop)
            pipeline = self._loaded()
            weighted = [(_concept(card), request.concepts[card.key]) for card in cards]
            rounded = _attach(pipeline, weighted)

            def report(done: int, total: int) -> None:
                self._raise_if_stopped(stop)
                on_step(done, total)

            images = pipeline.generate(
                request.prompt,
                seed=request.seed,
                num=request.num,
                steps=request.steps,
                guidance=request.guidance,
                negative_prompt=request.negative_prompt,
                on_step=report,
            )
            files = self._save(images, request, weighted)
            warnings = rounded + _prompt_warnings(pipeline, request.prompt, weighted)
        warnings += _switched_off(self.cards()[0], request)
        seeds = [request.seed + k for k in range(request.num)]
        command = command_line(request, cards, self.library.path)
        return Outcome(files, seeds, command, warnings)

    @staticmethod
    def _raise_if_stopped(stop: threading.Event) -> None:
        if stop.is_set():
            raise Stopped

    def _loaded(self) -> "ConceptPipeline":
        if self._pipeline is None:
            from sbora_diffusion.diffusion.bases import load_base
            from sbora_diffusion.diffusion.pipeline import ConceptPipeline

            self._pipeline = ConceptPipeline(load_base("pocket"))
        return self._pipeline

    def _chosen(self, request: Request) -> list[Card]:
        """The cards of a request in an order that depends on their keys alone."""
        cards = {card.key: card for card in self.cards()[0]}
        unknown = sorted(request.concepts.keys() - cards.keys())
        if unknown:
            raise ConfigError(
                f"there is no concept {unknown[0]!r} any more", "reload the page to see all"
            )
        return [cards[key] for key in sorted(request.concepts)]

    def _save(self, images: list, request: Request, weighted: list) -> list[Path]:
        from sbora_diffusion.pictures import picture_parameters, save_png

        assert self._pipeline
        folder = Path(self._folder.name)
        # The page has copied the pictures of the request before into its own cache.
        for old in folder.glob("*.png"):
            old.unlink()
        files = []
        for seed, image in enumerate(images, request.seed):
            parameters = picture_parameters(
                self._pipeline.base,
                request.prompt,
                weighted,
                seed=seed,
                steps=request.steps,
                guidance=request.guidance,
                negative_prompt=request.negative_prompt,
            )
            files.append(folder / f"sbora-{seed}-{secrets.token_hex(4)}.png")
            save_png(image, files[-1], parameters)
        return files


def command_line(request: Request, cards: list[Card], library: Path) -> str:
    """The `sbora generate` that draws the same pictures."""
    words = ["sbora", "generate", request.prompt]
    for card in cards:
        source = card.name if card.in_set else card.path
        words += ["--concept", f"{source}:{request.concepts[card.key]:g}"]
    if any(card.in_set for card in cards):
        words += ["--library", str(library)]
    words += ["--seed", str(request.seed), "--num", str(request.num)]
    if request.steps != DEFAULT_STEPS:
        words += ["--steps", str(request.steps)]
    if request.guidance != DEFAULT_GUIDANCE:
        words += ["--guidance", f"{request.guidance:g}"]
    if request.negative_prompt:
        words += ["--negative", request.negative_prompt]
    return shlex.join([*words, "-o", "picture.png"])


def _concept(card: Card) -> "Concept":
    return read_card(card.path, card.name if card.in_set else None)[0]


def _attach(pipeline: "ConceptPipeline", weighted: list) -> list[str]:
    """Make these concepts the attached ones; returns warnings."""
    rounded = pipeline.switch(weighted)
    return [f"{name} was trained on a rounded copy of the base." for name in rounded]


def _prompt_warnings(pipeline: "ConceptPipeline", prompt: str, weighted: list) -> list[str]:
    from sbora_diffusion.pictures import words_cut_off

    silent = {concept.meta.name for concept, weight in weighted if weight == 0}
    warnings = [
        f"The prompt does not mention {pipeline.concepts[name].meta.tokens[0].token}, so "
        f"{name} may not appear in the picture."
        for name in pipeline.unmentioned(prompt)
        if name not in silent and pipeline.concepts[name].meta.tokens
    ]
    if lost := words_cut_off(pipeline.base, prompt):
        warnings.append(f"The prompt is too long: “{lost}” was left out.")
    return warnings


def _switched_off(cards: list[Card], request: Request) -> list[str]:
    mentioned = tokens_in(request.prompt)
    return [
        f"The prompt mentions {card.token}, but {card.key} is off; switch it on to see it."
        for card in cards
        if card.token in mentioned and card.key not in request.concepts
    ]


def _checked(request: Request) -> Request:
    """The request with its seed drawn, once every value is known to be in its range."""
    if not request.prompt.strip():
        raise ConfigError("The prompt is empty", "say what the picture should show")
    for text in (request.prompt, request.negative_prompt):
        if len(text) > MAX_PROMPT:
            raise ConfigError(f"The prompt is longer than {MAX_PROMPT} characters", "shorten it")
    _within("The number of images", request.num, 1, MAX_IMAGES, whole=True)
    _within("The number of steps", request.steps, 1, MAX_STEPS, whole=True)
    _within("The seed", request.seed, -1, MAX_SEED, whole=True)
    _within("The guidance", request.guidance, 0, 30)
    for name, weight in request.concepts.items():
        _within(f"The weight of {name}", weight, 0, MAX_WEIGHT)
    return replace(request, seed=secrets.randbelow(MAX_SEED)) if request.seed == -1 else request


def _within(what: str, value: float, low: float, high: float, whole: bool = False) -> None:
    number = isinstance(value, int if whole else int | float) and math.isfinite(value)
    if not number or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{what} must be {kind} between {low} and {high}, got {value}")
