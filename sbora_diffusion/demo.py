"""`sbora demo`: teach the pocket base two subjects, merge them, and show what came out."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sbora_diffusion.alignment import figures, load_judges, score
from sbora_diffusion.console import Console
from sbora_diffusion.contact_sheet import Sheet
from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.core.storage import write_atomically
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import open_image, to_tensor
from sbora_diffusion.diffusion.merging import RECORD
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import DEFAULT_STEPS, ConceptPipeline, draw
from sbora_diffusion.diffusion.probe import denoising_error
from sbora_diffusion.diffusion.prompts import with_article
from sbora_diffusion.jobs import train_concept
from sbora_diffusion.library import Library
from sbora_diffusion.outputs import make_parent
from sbora_diffusion.pictures import save_png

DEMO = ("baseballcap", "plushbear")
SCENES = ("on the beach", "in the forest")
TOGETHER = ("a photo of {} next to {} on the beach", "a photo of {} next to {} in space")
STEPS = 80  # of the default 400: enough to recognise both, in minutes on two cores
SEED = 1
BASE, ALONE, MERGED = "base", "alone", "merged"


@dataclass
class Demo:
    """What the stages of one demo hand to each other.

    Attributes:
        pictures: (concept name or "together", model) → pictures.
        errors: concept name → model → denoising error of its references.
        alignment: concept name → model → text and image alignment; empty without a judge.
    """

    base: Base
    folder: Path
    console: Console
    config: TrainConfig
    calibration: CalibrateConfig
    sampling_steps: int
    subjects: list[Subject]
    references: dict[str, list[Image.Image]]
    concepts: dict[str, Concept] = field(default_factory=dict)
    pictures: dict[tuple[str, str], list[Image.Image]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a stage, with a progress bar, and say how long it took."""
        began = time.monotonic()
        with self.console.progress(name) as bar:
            yield bar
        self.seconds[name] = round(time.monotonic() - began, 1)
        self.console.say(f"{name}: {self.seconds[name]:.0f} s")

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], bar: Callable) -> list:
        return draw(self.base, prompts, seeds, self.sampling_steps, on_step=bar)

    def measure(self, subject: Subject, model: str, words: str) -> None:
        name = subject.settings.name
        pixels = [to_tensor(picture) for picture in self.references[name]]
        error = denoising_error(self.base, pixels, f"a photo of {words}")
        self.errors.setdefault(name, {})[model] = error


def run_demo(
    base: Base,
    folder: Path,
    console: Console,
    config: TrainConfig,
    sampling_steps: int = DEFAULT_STEPS,
    calibration: CalibrateConfig | None = None,
) -> dict[str, Any]:
    """Run all of it and write `demo.png`, two concept files, `merged/` and `demo.json`.

    It keeps a library of its own in the folder and leaves the user's alone.

    Returns:
        What `demo.json` holds: times, losses, errors and alignment.

    Raises:
        ConfigError: `merged/` exists and is not the demo's.
        ResourceError: the folder cannot be written.
    """
    make_parent(folder / RECORD)
    _refuse_foreign(folder / "merged")
    subjects = [read_subject(path) for path in demo_folders()]
    references = {s.settings.name: _references(s, base.resolution) for s in subjects}
    calibration = calibration or CalibrateConfig()
    demo = Demo(base, folder, console, config, calibration, sampling_steps, subjects, references)
    _before(demo)
    for subject in subjects:
        _learn(demo, subject)
    _together(demo)
    _say_errors(demo)
    _align(demo)
    sheet = folder / "demo.png"
    save_png(_sheet(demo), sheet, {"seed": SEED, "steps": sampling_steps})
    console.say(f"all together {sum(demo.seconds.values()):.0f} s; look at {sheet}")
    record = _record(demo)
    write_atomically(folder / "demo.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


def demo_folders() -> list[Path]:
    """The demo's concept folders: in the installed package, else in the checkout.

    Raises:
        DataError: neither has them.
    """
    package = Path(__file__).parent
    for place in (package / "demo_concepts", package.parent / "concepts"):
        if all((place / name).is_dir() for name in DEMO):
            return [place / name for name in DEMO]
    raise DataError("the demo's concepts are missing", "install the package again")


def _references(subject: Subject, size: int) -> list[Image.Image]:
    return [
        ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS)
        for path in subject.images
    ]


def _before(demo: Demo) -> None:
    """What the base draws for the bare class nouns."""
    nouns = [_noun(subject) for subject in demo.subjects]
    with demo.stage("drawing with the base alone") as bar:
        for subject, noun in zip(demo.subjects, nouns, strict=True):
            name = subject.settings.name
            demo.pictures[name, BASE] = demo.draw(_prompts(noun), [SEED] * len(SCENES), bar)
            demo.measure(subject, BASE, noun)
        prompts = [text.format(*nouns) for text in TOGETHER]
        demo.pictures["together", BASE] = demo.draw(prompts, [SEED] * len(prompts), bar)


def _learn(demo: Demo, subject: Subject) -> None:
    """Train one concept and draw with it alone."""
    name, token = subject.settings.name, subject.settings.token
    file = demo.folder / f"{name}.safetensors"
    with demo.stage(f"learning {token}") as bar:
        result = train_concept(
            demo.base,
            subject,
            demo.config,
            library=Library(demo.folder / "library.sqlite3"),
            output=file,
            on_record=lambda r: bar(r.step, r.steps, f"loss {r.loss:.3f}"),
        )
    demo.losses[name] = [result.loss_first, result.loss_last]
    demo.concepts[name] = read_concept(file)
    with demo.stage(f"drawing {token} alone") as bar:
        pipeline = ConceptPipeline(demo.base)
        pipeline.add(demo.concepts[name])
        try:
            demo.pictures[name, ALONE] = demo.draw(_prompts(token), [SEED] * len(SCENES), bar)
            demo.measure(subject, ALONE, token)
        finally:
            pipeline.remove(name)


def _together(demo: Demo) -> None:
    """Merge all concepts, write the model, and draw with it."""
    concepts = [(concept, 1.0) for concept in demo.concepts.values()]
    with demo.stage("merging") as bar:
        merged = Calibrated(demo.base, concepts, demo.calibration, on_step=bar)
    with demo.stage("drawing with the merged model") as bar:
        try:
            shutil.rmtree(demo.folder / "merged", ignore_errors=True)
            merged.save(demo.folder / "merged")
            for subject in demo.subjects:
                name, token = subject.settings.name, subject.settings.token
                seeds = [SEED] * len(SCENES)
                demo.pictures[name, MERGED] = demo.draw(_prompts(token), seeds, bar)
                demo.measure(subject, MERGED, token)
            tokens = [subject.settings.token for subject in demo.subjects]
            prompts = [text.format(*tokens) for text in TOGETHER for _ in range(2)]
            seeds = [SEED, SEED + 1] * len(TOGETHER)
            demo.pictures["together", MERGED] = demo.draw(prompts, seeds, bar)
        finally:
            merged.restore()


def _say_errors(demo: Demo) -> None:
    demo.console.say("how well the model redraws the references (lower is better):")
    for subject in demo.subjects:
        error = demo.errors[subject.settings.name]
        demo.console.say(
            f"  {subject.settings.token}: error {error[BASE]:.3f} as {_noun(subject)!r} → "
            f"{error[ALONE]:.3f} learned, {error[MERGED]:.3f} merged"
        )


def _align(demo: Demo) -> None:
    """Text and image alignment of what was drawn of each concept, if a judge is there."""
    try:
        with demo.stage("judging"):
            judges = load_judges()
            for subject in demo.subjects:
                name = subject.settings.name
                references = judges.features(demo.references[name])
                texts = _prompts(_noun(subject))
                demo.alignment[name] = {
                    model: score(judges, demo.pictures[name, model], texts, references).means()
                    for model in (BASE, ALONE, MERGED)
                }
    except ConfigError as error:
        demo.console.say(f"text and image alignment are left out: {error}")
    else:
        _say_alignment(demo)


def _say_alignment(demo: Demo) -> None:
    models, rows = (BASE, ALONE, MERGED), []
    for subject in demo.subjects:
        by_model = [figures(demo.alignment[subject.settings.name][model]) for model in models]
        rows += [
            [subject.settings.token, figure, *(means[figure] for means in by_model)]
            for figure in by_model[0]
        ]
    demo.console.table(["concept", "higher is better", *models], rows)


def _sheet(demo: Demo) -> Image.Image:
    """References, base, alone and merged of each concept, then both in one picture."""
    sheet = Sheet(columns=6)
    for subject in demo.subjects:
        name, token = subject.settings.name, subject.settings.token
        sheet.heading(f"{token}: learned from these pictures")
        sheet.row([(picture, "") for picture in demo.references[name]])
        by_model = [demo.pictures[name, model] for model in (BASE, ALONE, MERGED)]
        labels = (f"base: {subject.settings.class_noun}", f"{token}, alone", f"{token}, merged")
        sheet.heading(*(f"… {scene}" for scene in SCENES))
        pairs = [zip(scene, labels, strict=True) for scene in zip(*by_model, strict=True)]
        sheet.row([pair for scene in pairs for pair in scene])
    tokens = [subject.settings.token for subject in demo.subjects]
    sheet.heading(*(text.removeprefix("a photo of ").format(*tokens) for text in TOGETHER))
    base, both = demo.pictures["together", BASE], demo.pictures["together", MERGED]
    sheet.row(
        [
            pair
            for k in range(len(TOGETHER))
            for pair in ((base[k], "base"), *((p, "merged") for p in both[2 * k : 2 * k + 2]))
        ]
    )
    return sheet.image()


def _record(demo: Demo) -> dict[str, Any]:
    return {
        "folder": str(demo.folder),
        "base_key": demo.base.key,
        "seconds": demo.seconds,
        "seconds_in_all": round(sum(demo.seconds.values()), 1),
        "losses": demo.losses,
        "denoising_errors": demo.errors,
        "alignment": demo.alignment,
        "digests": {name: concept.meta.digest for name, concept in demo.concepts.items()},
        "training": demo.config.model_dump(mode="json"),
        "sampling_steps": demo.sampling_steps,
    }


def _prompts(words: str) -> list[str]:
    return [f"a photo of {words} {scene}" for scene in SCENES]


def _noun(subject: Subject) -> str:
    return with_article(subject.settings.class_noun)


def _refuse_foreign(folder: Path) -> None:
    """`merged/` is replaced, but only where it is a merged model."""
    if folder.exists() and not (folder / RECORD).is_file():
        raise ConfigError(f"{folder} exists and is not the demo's", "give another --out")
