"""The qualitative figure: references left, one column for each method, the same seeds."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from PIL import Image, ImageOps

from sbora_diffusion.comparison.measuring import drawn
from sbora_diffusion.comparison.work import Work
from sbora_diffusion.contact_sheet import TILE, Sheet
from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.evaluation.prompt_sets import load_prompts

PROMPTS = (0, 5, 10, 15)
"""The first of each group."""
Columns = Mapping[str, Mapping[tuple[str, int], Image.Image | None]]
"""Entry → (concept, number of the prompt) → picture; None where it is broken."""


def figure(
    work: Work, seed: int, prompts: Sequence[int] = PROMPTS, merged: bool = False
) -> Image.Image:
    """Draw every concept with every entry: a row for each concept and prompt.

    Args:
        seed: of the trainings.
        prompts: numbers of the concepts' prompts, from 0.
        merged: draw all concepts of the work in one model, merged in each method's own way.

    Raises:
        ConfigError: there is no such prompt.
    """
    templates = {name: _templates(work, name, prompts) for name in work.subjects}
    work.progress.begin(len(work.entries))
    columns: dict[str, dict[tuple[str, int], Image.Image | None]] = {}
    for name in work.entries:
        columns[name] = _column(work, name, seed, templates, merged)
        work.progress.step(name)
    return _sheet(work, columns, templates)


def _templates(work: Work, name: str, prompts: Sequence[int]) -> dict[int, str]:
    """Number → a prompt about the bare class noun."""
    settings = work.subjects[name].settings
    known = load_prompts(work.preset.wording).for_subject(settings.category, settings.class_noun)
    about = known.about(settings.class_noun)
    if wrong := [k for k in prompts if not 0 <= k < len(about)]:
        raise ConfigError(f"there is no prompt {wrong[0]}", f"give 0 to {len(about) - 1}")
    return {k: about[k] for k in prompts}


def _column(
    work: Work,
    name: str,
    seed: int,
    templates: Mapping[str, Mapping[int, str]],
    merged: bool,
) -> dict[tuple[str, int], Image.Image | None]:
    how = work.preset.methods[name].how
    trained = work.trained(name, seed, list(work.subjects))
    found: dict[tuple[str, int], Image.Image | None] = {}
    with ExitStack() as stack:
        if merged:
            concepts = [own.concept for own in trained.values()]
            stack.enter_context(how.merged(work.base, concepts))
        for concept, numbers in templates.items():
            with ExitStack() as alone:
                if not merged:
                    alone.enter_context(how.alone(work.base, trained[concept].concept))
                pictures = _drawn(work, concept, how.words(trained[concept].concept), numbers)
            found |= {(concept, k): p for k, p in zip(numbers, pictures, strict=True)}
    return found


def _drawn(
    work: Work, concept: str, words: str, numbers: Mapping[int, str]
) -> Sequence[Image.Image | None]:
    settings, preset = work.subjects[concept].settings, work.preset
    known = load_prompts(preset.wording).for_subject(settings.category, settings.class_noun)
    prompts = [known.about(words)[k] for k in numbers]
    try:
        seeds = [preset.picture_seed] * len(prompts)
        return list(drawn(work.base, prompts, seeds, preset.drawing(1), preset.drawn_at_once))
    except NonFiniteError:
        return [None] * len(prompts)


def _sheet(work: Work, columns: Columns, templates: Mapping[str, Mapping[int, str]]) -> Image.Image:
    sheet = Sheet(columns=1 + len(columns))
    for concept, numbers in templates.items():
        references = [open_image(file) for file in work.subjects[concept].images]
        for row, (k, prompt) in enumerate(numbers.items()):
            sheet.heading(f"{concept}: {prompt}")
            reference = references[row % len(references)]
            cells = [(_tile(reference), "reference")]
            for name, found in columns.items():
                picture = found[concept, k]
                title = work.preset.methods[name].name
                cells.append((_tile(picture), title if picture else f"{title}: broken"))
            sheet.row(cells)
    return sheet.image()


def _tile(picture: Image.Image | None) -> Image.Image:
    if picture is None:
        return Image.new("RGB", (TILE, TILE), "#e9e9e9")
    return ImageOps.fit(picture, (TILE, TILE), Image.Resampling.LANCZOS)
