"""What `sbora evaluate` does: judge a concept against its bare class word, or a picture folder."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import Field

from sbora_diffusion.alignment import Judges, Scores, difference, joined, score
from sbora_diffusion.contact_sheet import TILE, Sheet
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import DataError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import image_files
from sbora_diffusion.diffusion.config import DrawConfig
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, StepCallback, draw
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.evaluation.features import BATCH_SIZE
from sbora_diffusion.evaluation.protocols import PLACEHOLDER, RAW_COSINE, Protocol
from sbora_diffusion.pictures import read_prompt

PROMPTS = (
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in the forest",
    "a photo of {} in space",
    "a photo of {} in a kitchen",
    "a photo of {} on a green background",
    "a photo of {} next to a banana in a room",
    "a photo of {} next to a tree in a meadow",
    "a drawing of {} in the desert",
    "a watercolour painting of {} in the mountains at sunset",
)
CLASS_WORD, CONCEPT = "class_word", "concept"
COLUMNS = 8


class EvaluateConfig(DrawConfig):
    """Everything beside concept, base and judges that decides what `sbora evaluate` finds."""

    num: int = Field(2, ge=1, le=1000, description="pictures of each prompt")


@dataclass(frozen=True)
class Judged:
    """Pictures that were judged, each with the text it was held against."""

    pictures: Sequence[Image.Image]
    texts: Sequence[str | None]
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        record: figures and all that decides them, ready for JSON.
        groups: what is compared: its name → its pictures; the same texts in each.
    """

    record: dict[str, Any]
    groups: Mapping[str, Judged]
    references: Sequence[Image.Image] = ()

    def sheet(self) -> Image.Image:
        """References, then the pictures below their texts, each with its text alignment."""
        sheet = Sheet(columns=COLUMNS)
        if self.references:
            sheet.heading("references")
            _rows(sheet, [(_tile(picture), "") for picture in self.references])
        first = next(iter(self.groups.values()))
        for text in dict.fromkeys(first.texts):
            sheet.heading(text or "no prompt is known")
            _rows(sheet, [tile for name in self.groups for tile in self._tiles(name, text)])
        return sheet.image()

    def _tiles(self, name: str, text: str | None) -> list[tuple[Image.Image, str]]:
        group, label = self.groups[name], name.replace("_", " ")
        return [
            (_tile(picture), label if text is None else f"{label} {cosine:.3f}".strip())
            for picture, own, cosine in zip(
                group.pictures, group.texts, group.scores.text.tolist(), strict=True
            )
            if own == text
        ]


def evaluate_concept(
    base: Base,
    concept: Concept,
    references: Sequence[Image.Image],
    judges: Judges,
    config: EvaluateConfig,
    *,
    weight: float = 1.0,
    prompts: Sequence[str] = PROMPTS,
    protocol: Protocol = RAW_COSINE,
    on_step: StepCallback | None = None,
) -> Evaluation:
    """Draw the same prompts with a concept and with its bare class word, and compare both.

    The bare class word on the base alone bounds what a concept can reach from above in text
    alignment, and from below in image alignment. Picture k of every prompt starts from seed + k.

    Args:
        references: pictures of the subject.
        prompts: each with one `{}` where the subject stands.
        on_step: called with (steps done, steps in all).

    Raises:
        BaseMismatch, ConflictError, FormatError: see `ConceptPipeline.add`.
        NonFiniteError: a picture became NaN or infinite.
    """
    began = time.monotonic()
    bare = with_article(concept.meta.class_noun)
    words = concept.meta.tokens[0].token if concept.meta.tokens else bare
    pipeline, drawn = ConceptPipeline(base), {}
    rounded = pipeline.add(concept, weight)
    try:
        drawn[CONCEPT] = _draw(base, prompts, words, config, on_step, 0)
    finally:
        pipeline.remove(concept.meta.name)
    drawn[CLASS_WORD] = _draw(base, prompts, bare, config, on_step, 1)

    compared = judges.features(references)
    texts = [prompt.format(bare) for prompt in prompts for _ in range(config.num)]
    groups = {
        name: Judged(drawn[name], texts, score(judges, drawn[name], texts, compared, protocol))
        for name in (CLASS_WORD, CONCEPT)
    }
    record = {
        "concept": concept.meta.name,
        "digest": concept.meta.digest,
        "weight": weight,
        "base": base.public_name,
        "base_key": base.key,
        "rounded_base": rounded,
        "clip": judges.clip.name,
        "protocol": protocol.record(judges.clip.name),
        "stands_for": {words: bare},
        "references": len(references),
        "settings": config.model_dump(mode="json"),
        **_compared({name: group.scores for name, group in groups.items()}),
        "prompts": [
            {"prompt": prompt.format(words), **_compared(_of_prompt(groups, k, config.num))}
            for k, prompt in enumerate(prompts)
        ],
        "seconds": round(time.monotonic() - began, 3),
    }
    return Evaluation(record, groups, references)


def evaluate_folder(
    folder: Path,
    judges: Judges,
    references: Sequence[Image.Image] = (),
    *,
    prompt: str | None = None,
    nouns: Mapping[str, str] | None = None,
    protocol: Protocol = RAW_COSINE,
    on_step: StepCallback | None = None,
) -> Evaluation:
    """Judge the pictures in a folder by the prompts noted in them.

    Args:
        prompt: of pictures that hold none.
        nouns: placeholder token → the words that stand for it in text alignment.
        on_step: called with (pictures judged, pictures in all).

    Raises:
        DataError: see `read_pictures`; or there are neither prompts nor references.
    """
    files = image_files_of(folder)
    prompts = [read_prompt(file) or prompt for file in files]
    if not references and not any(prompts):
        raise DataError(
            f"the pictures in {folder} hold no prompts, and there are no references",
            "give --prompt or --references",
        )
    texts = [text and protocol.plain(text, nouns or {}) for text in prompts]
    judged = _judge_files(judges, files, texts, references, protocol, on_step)
    record = {
        "folder": str(folder),
        "clip": judges.clip.name,
        "protocol": protocol.record(judges.clip.name),
        "stands_for": dict(nouns or {}),
        "unknown_tokens": _tokens(texts),
        "removed_tokens": sorted(set(_tokens(prompts)) - {*(nouns or {}), *_tokens(texts)}),
        "without_prompt": texts.count(None),
        "references": len(references),
        **judged.scores.means(),
        "files": [
            {"file": file.name, "text": text, **_single(judged.scores, k)}
            for k, (file, text) in enumerate(zip(files, texts, strict=True))
        ],
    }
    return Evaluation(record, {"": judged}, references)


def read_pictures(folder: Path) -> list[Image.Image]:
    """All pictures in a folder.

    Raises:
        DataError: the folder is missing or has no pictures, or one of them cannot be read.
    """
    return [open_image(file) for file in image_files_of(folder)]


def image_files_of(folder: Path) -> list[Path]:
    """The picture files in a folder, at least one.

    Raises:
        DataError: the folder is missing or has no pictures.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "give a folder with pictures")
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder} has no pictures", "give a folder with pictures")
    return files


def _draw(
    base: Base,
    prompts: Sequence[str],
    words: str,
    config: EvaluateConfig,
    on_step: StepCallback | None,
    half: int,
) -> list[Image.Image]:
    """`num` pictures of each prompt, in the order of the prompts."""

    def report(done: int, total: int) -> None:
        if on_step:
            on_step(half * total + done, 2 * total)

    texts = [prompt.format(words) for prompt in prompts for _ in range(config.num)]
    seeds = [config.seed + k for _ in prompts for k in range(config.num)]
    options = config.model_dump(include={"steps", "guidance", "negative_prompt"})
    return draw(base, texts, seeds, **options, on_step=report)


def _judge_files(
    judges: Judges,
    files: Sequence[Path],
    texts: Sequence[str | None],
    references: Sequence[Image.Image],
    protocol: Protocol,
    on_step: StepCallback | None,
) -> Judged:
    """Judge a few files at a time, and keep of each picture what a sheet shows."""
    compared = judges.features(references) if references else None
    tiles, parts = [], []
    for start in range(0, len(files), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        pictures = [open_image(file) for file in files[rows]]
        parts.append(score(judges, pictures, texts[rows], compared, protocol))
        tiles += [_tile(picture) for picture in pictures]
        if on_step:
            on_step(len(tiles), len(files))
    return Judged(tiles, texts, joined(parts))


def _tokens(texts: Sequence[str | None]) -> list[str]:
    return sorted({token for text in texts if text for token in PLACEHOLDER.findall(text)})


def _of_prompt(groups: Mapping[str, Judged], number: int, num: int) -> dict[str, Scores]:
    rows = slice(number * num, (number + 1) * num)
    return {name: group.scores.part(rows) for name, group in groups.items()}


def _compared(scores: Mapping[str, Scores]) -> dict[str, Any]:
    means = {name: part.means() for name, part in scores.items()}
    return {**means, "difference": difference(means[CONCEPT], means[CLASS_WORD])}


def _single(scores: Scores, row: int) -> dict[str, Any]:
    means = scores.part(slice(row, row + 1)).means()
    return {key: means[key] for key in ("text_alignment", "image_alignment")}


def _rows(sheet: Sheet, tiles: list[tuple[Image.Image, str]]) -> None:
    for start in range(0, len(tiles), COLUMNS):
        sheet.row(tiles[start : start + COLUMNS])


def _tile(picture: Image.Image) -> Image.Image:
    return ImageOps.fit(picture, (TILE, TILE), Image.Resampling.LANCZOS)
