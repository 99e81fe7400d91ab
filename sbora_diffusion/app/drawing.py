"""What the tab Generate does without its page: pictures of what was asked for."""

import math
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbora_diffusion.app.engine import Engine
from sbora_diffusion.app.shown import shown_command
from sbora_diffusion.app.workspace import Handout, Workspace
from sbora_diffusion.cards import Card, read_card
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.prompts import tokens_in, with_nouns

if TYPE_CHECKING:  # torch and diffusers take seconds to import: only once they are needed
    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline, Sampler

MAX_IMAGES, MAX_STEPS, MAX_SEED, MAX_PROMPT = 8, 100, 2**31 - 1, 1000
MAX_WEIGHT, MAX_REGIONS = 1.5, 2000
MAX_TIMES = 4
"""A side may be so many times the base's own."""
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 4.0
AUTO = "auto"
"""In the place of regions: find out where each concept should be."""

_SIZE = re.compile(r"\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What one press of Generate asks for.

    Attributes:
        concepts: a card's key → its weight.
        seed: −1 for a random one.
        size: `WIDTH × HEIGHT` in pixels, "" for the base's own.
        regions: a line `NAME=x0,y0,x1,y1` for each concept, `AUTO`, or "" for none.
    """

    prompt: str
    concepts: Mapping[str, float]
    seed: int = -1
    num: int = 1
    steps: int = DEFAULT_STEPS
    guidance: float = DEFAULT_GUIDANCE
    negative_prompt: str = ""
    regions: str = ""
    size: str = ""

    @property
    def sides(self) -> dict[str, int]:
        """Width and height in pixels; empty for the base's own.

        Raises:
            ConfigError: the size is written in another way.
        """
        if not self.size.strip():
            return {}
        match = _SIZE.fullmatch(self.size)
        if not match:
            raise ConfigError(f"The size {self.size!r} is none", "e.g. 192 × 128")
        return {"width": int(match[1]), "height": int(match[2])}

    @property
    def places(self) -> list[str]:
        """The lines of the regions."""
        return [line.strip() for line in self.regions.splitlines() if line.strip()]


@dataclass(frozen=True)
class Outcome:
    """Pictures as files, one seed each."""

    files: list[Path]
    seeds: list[int]
    command: str
    warnings: list[str]


class Stopped(Exception):
    """The person who asked for the pictures does not want them any more."""


class Studio:
    """Draws with the concepts of one workspace."""

    def __init__(self, workspace: Workspace, engine: Engine, handout: Handout):
        self.workspace, self.engine, self.handout = workspace, engine, handout

    def draw(self, request: Request, on_step: Progress, stop: threading.Event) -> Outcome:
        """Draw the pictures; equal requests give equal pixels, whatever was drawn before.

        Raises:
            SboraError: the request makes no sense, or its concepts cannot be used together.
            Stopped: `stop` was set.
        """
        request = _checked(request)
        cards = self.workspace.chosen(request.concepts)
        with self.engine.pipeline(self.workspace.base.reference) as pipeline:
            _raise_if_stopped(stop)
            weighted = [(_concept(card), request.concepts[card.key]) for card in cards]
            rounded = _attach(pipeline, weighted)
            sampler, placed = _sampler(pipeline, request)
            for name, side in request.sides.items():
                _within(f"The {name}", side, 8, MAX_TIMES * pipeline.base.resolution, whole=True)

            def report(done: int, total: int) -> None:
                _raise_if_stopped(stop)
                on_step(done, total)

            images = pipeline.generate(
                request.prompt,
                seed=request.seed,
                num=request.num,
                steps=request.steps,
                guidance=request.guidance,
                negative_prompt=request.negative_prompt,
                **request.sides,
                on_step=report,
                sampler=sampler,
            )
            placed |= request.sides
            files = self._save(pipeline, images, request, weighted, placed)
            warnings = rounded + _prompt_warnings(pipeline, request.prompt, weighted)
        warnings += _switched_off(self.workspace.cards()[0], request)
        seeds = [request.seed + k for k in range(request.num)]
        command = command_line(request, self.workspace)
        return Outcome(files, seeds, command, warnings)

    def bare(self, request: Request) -> Request:
        """The same picture as the base draws it: class nouns for tokens, and no concepts."""
        nouns = {card.token: card.class_noun for card in self.workspace.cards()[0]}
        prompt = with_nouns(request.prompt, nouns).text
        return replace(request, prompt=prompt, concepts={}, regions="", num=1)

    def _save(
        self,
        pipeline: "ConceptPipeline",
        images: list,
        request: Request,
        weighted: list,
        placed: dict[str, Any],
    ) -> list[Path]:
        from sbora_diffusion.pictures import picture_parameters, save_png

        files = []
        for seed, image in enumerate(images, request.seed):
            parameters = picture_parameters(
                pipeline.base,
                request.prompt,
                weighted,
                seed=seed,
                steps=request.steps,
                guidance=request.guidance,
                negative_prompt=request.negative_prompt,
            )
            files.append(self.handout.place(f"sbora-{seed}.png"))
            save_png(image, files[-1], {**parameters, **placed})
        return files


def command_line(request: Request, workspace: Workspace) -> str:
    """The `sbora generate` that draws the same pictures."""
    words = ["sbora", "generate", request.prompt]
    for spec in workspace.specs(request.concepts):
        words += ["--concept", spec]
    if any(card.path.parent != workspace.examples for card in workspace.chosen(request.concepts)):
        words += ["--library", str(workspace.library.path)]
    words += workspace.base.option
    for place in request.places:
        words += ["--auto-regions"] if place == AUTO else ["--region", place]
    words += ["--seed", str(request.seed), "--num", str(request.num)]
    if request.steps != DEFAULT_STEPS:
        words += ["--steps", str(request.steps)]
    if request.guidance != DEFAULT_GUIDANCE:
        words += ["--guidance", f"{request.guidance:g}"]
    if request.negative_prompt:
        words += ["--negative", request.negative_prompt]
    if _SIZE.fullmatch(request.size) and request.size != workspace.base.sizes[0]:
        words += [part for k, v in request.sides.items() for part in (f"--{k}", str(v))]
    return shown_command([*words, "-o", "picture.png"])


def _concept(card: Card) -> "Concept":
    return read_card(card.path, card.name if card.in_set else None)[0]


def _raise_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _sampler(
    pipeline: "ConceptPipeline", request: Request
) -> "tuple[Sampler | None, dict[str, Any]]":
    """How to draw, None for the usual way, and what the pictures note of it."""
    if not request.places:
        return None, {}
    from sbora_diffusion.diffusion.regions import parse_regions, region_sampler

    if not pipeline.concepts:
        raise ConfigError("Regions need a concept", "switch one on, or clear the regions")
    boxes = {} if request.places == [AUTO] else parse_regions(request.places)
    return region_sampler(pipeline, boxes)


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
    if len(request.regions) > MAX_REGIONS:
        raise ConfigError(f"The regions are longer than {MAX_REGIONS} characters", "shorten them")
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


def restored(parameters: Mapping[str, Any], cards: list[Card]) -> tuple[Request, list[str]]:
    """The request that a picture's parameters tell of, and the concepts that are not known here.

    Raises:
        ConfigError: the parameters are not those of a picture.
    """
    keys = {card.name: card.key for card in cards}
    try:
        weights = {c["name"]: float(c["weight"]) for c in parameters.get("concepts", [])}
        request = Request(
            prompt=str(parameters["prompt"]),
            concepts={keys[name]: weight for name, weight in weights.items() if name in keys},
            seed=int(parameters["seed"]),
            steps=int(parameters["steps"]),
            guidance=float(parameters["guidance"]),
            negative_prompt=str(parameters.get("negative_prompt", "")),
            regions=_lines(parameters.get("regions") or {}),
            size=_size(parameters),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError("The parameters in this picture are damaged", "take another") from error
    return _checked(request), [name for name in weights if name not in keys]


def _size(parameters: Mapping[str, Any]) -> str:
    if not {"width", "height"} <= parameters.keys():
        return ""
    return f"{int(parameters['width'])} × {int(parameters['height'])}"


def _lines(regions: Any) -> str:
    if regions == AUTO:
        return AUTO
    return "\n".join(
        f"{name}={','.join(f'{float(edge):g}' for edge in box)}" for name, box in regions.items()
    )
