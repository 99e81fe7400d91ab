"""The command that judges a concept, or pictures that were drawn before."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import (
    BaseOption,
    ConfigOption,
    Console,
    DeviceOption,
    JsonOption,
    LibraryOption,
    SetOption,
    open_base,
    quiet_libraries,
    read_settings,
)
from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from PIL.Image import Image

    from sbora_diffusion.alignment import Judges
    from sbora_diffusion.evaluate import Evaluation
    from sbora_diffusion.evaluation.protocols import Protocol

LITE_HINT = "pip install 'sbora-diffusion[lite2]' adds image alignment by EfficientNet-lite2"


def evaluate(
    target: Annotated[str, typer.Argument(metavar="FILE[:WEIGHT]|FOLDER")],
    references: Annotated[
        Path | None,
        typer.Option(help="Folder with pictures of the subject; concepts/NAME for a concept"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PNG with all that was judged")
    ] = None,
    clip: Annotated[
        str, typer.Option(metavar="MODEL[:PRETRAINED]", help="The judge: a model of open_clip")
    ] = "pocket-clip",
    protocol: Annotated[
        str, typer.Option(help="Published convention: raw-cosine, mix-of-show, custom-diffusion")
    ] = "raw-cosine",
    dino: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER|timm", help="Weights of DINO ViT-S/16, a further judge"),
    ] = None,
    kid: Annotated[
        Path | None, typer.Option(help="Folder with real pictures: kernel distance to them")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of pictures that hold none")] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(metavar="<TOKEN>=NOUN", help="What a token in the prompts stands for"),
    ] = None,
    base: BaseOption = None,
    seed: Annotated[int | None, typer.Option(help="Picture k of a prompt: seed + k")] = None,
    num: Annotated[int | None, typer.Option(help="Pictures of each prompt")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps")] = None,
    device: DeviceOption = None,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Text and image alignment of a concept, or of a folder with pictures."""
    quiet_libraries()
    from sbora_diffusion.evaluate import EvaluateConfig
    from sbora_diffusion.evaluation.protocols import find_protocol
    from sbora_diffusion.outputs import check_picture_output
    from sbora_diffusion.pictures import save_png

    console = Console(as_json)
    judging = _Judging(find_protocol(protocol), clip, dino, device)
    if output:
        check_picture_output(output)
    flags = {"seed": seed, "num": num, "steps": steps}
    drawing = {**flags, "config": config, "set": settings, "base": base}
    if Path(target).is_dir():
        _refuse(drawing, "is for a concept file, a folder's pictures are drawn already")
        found = _folder(console, Path(target), references, kid, judging, prompt, token)
    else:
        folder_only = {"prompt": prompt, "token": token, "kid": kid}
        _refuse(folder_only, "is for a folder with pictures")
        recipe = read_settings(EvaluateConfig, config, settings, flags)
        found = _concept(console, target, references, judging, base, library, recipe)
    if output:
        save_png(found.sheet(), output, {"judged": Path(target).name})
        console.say(str(output))
    console.result(found.record)


def _concept(
    console: Console,
    target: str,
    folder: Path | None,
    judging: "_Judging",
    base: str | None,
    library: Path | None,
    recipe: Any,
) -> "Evaluation":
    from sbora_diffusion.evaluate import evaluate_concept, read_pictures
    from sbora_diffusion.lookup import load_concepts

    _refuse_missing(target)
    ((concept, weight),) = load_concepts([target], Library(library))
    references = read_pictures(folder or _default_references(concept.meta.name))
    judges = judging.load()
    model = open_base(base or concept.meta.base_name or "pocket", judging.device)
    with console.progress("drawing") as bar:
        found = evaluate_concept(
            model, concept, references, judges, recipe,
            weight=weight, protocol=judging.protocol, on_step=bar,
        )  # fmt: skip
    if found.record["rounded_base"]:
        console.warn(f"{concept.meta.name} was trained on a rounded copy of this base")
    _say_concept(console, found.record, hint=not judges.further)
    judging.say(console, found.record)
    return found


def _folder(
    console: Console,
    folder: Path,
    references: Path | None,
    real: Path | None,
    judging: "_Judging",
    prompt: str | None,
    tokens: list[str] | None,
) -> "Evaluation":
    from sbora_diffusion.evaluate import evaluate_folder, image_files_of, read_pictures

    nouns = dict(_token_and_noun(text) for text in tokens or [])
    for place in (folder, real):
        if place:
            image_files_of(place)
    pictures: list[Image] = read_pictures(references) if references else []
    judges = judging.load()
    distances = _distances(console, judges, folder, real) if real else {}
    with console.progress("judging") as bar:
        found = evaluate_folder(
            folder, judges, pictures,
            prompt=prompt, nouns=nouns, protocol=judging.protocol, on_step=bar,
        )  # fmt: skip
    _say_folder(console, found.record, hint=bool(pictures) and not judges.further)
    judging.say(console, found.record)
    if distances:
        _say_distances(console, distances)
        found.record["kid"] = distances
    return found


def _distances(console: Console, judges: "Judges", folder: Path, real: Path) -> dict[str, Any]:
    from sbora_diffusion.distances import folder_distances

    with console.progress("comparing") as bar:
        return folder_distances(judges, folder, real, on_step=bar)


def _say_distances(console: Console, distances: dict[str, Any]) -> None:
    console.say("kernel distance (KID), not of Inception features:")
    rows = [
        [name, f"{d['mean']:.4f}", f"{d['deviation']:.4f}", f"{d['subsets']} of {d['subset_size']}"]
        for name, d in distances.items()
    ]
    console.table(["", "mean", "deviation", "subsets"], rows)


@dataclass(frozen=True)
class _Judging:
    """Who judges, and by which convention."""

    protocol: "Protocol"
    clip: str
    dino: str | None
    device: str | None

    def load(self) -> "Judges":
        from sbora_diffusion.alignment import load_judges
        from sbora_diffusion.diffusion.bases import best_device

        return load_judges(self.clip, self.device or best_device(), self.dino)

    def say(self, console: Console, record: dict[str, Any]) -> None:
        """State the convention, and what keeps the figures from those that are published."""
        console.say(f"protocol {self.protocol.stated()}")
        if not self.protocol.published_with(record["clip"]):
            console.say(
                f"published with {self.protocol.clip}: figures of {record['clip']} compare with "
                "those only if it is the same model"
            )
        if self.protocol.dino and not self.dino:
            console.say("published beside DINO ViT-S/16: --dino gives its weights")


def _say_concept(console: Console, record: dict[str, Any], hint: bool) -> None:
    from sbora_diffusion.alignment import figures

    ((token, bare),) = record["stands_for"].items()
    console.say(
        f"{record['concept']['pictures']} pictures with {token}, as many of {bare!r} by the base "
        f"alone, {record['references']} references"
    )
    console.say(f"in text alignment {token} counts as {bare!r}; judged by {record['clip']}")
    parts = [figures(record[name]) for name in ("class_word", "concept")]
    parts.append(figures(record["difference"], signed=True))
    console.table(
        ["", "bare class word", "concept", "difference"],
        [[name, *(part[name] for part in parts)] for name in parts[0]],
    )
    if hint:
        console.say(LITE_HINT)


def _say_folder(console: Console, record: dict[str, Any], hint: bool) -> None:
    from sbora_diffusion.alignment import figures

    for token, noun in record["stands_for"].items():
        console.say(f"in text alignment {token} counts as {noun!r}")
    for token in record["unknown_tokens"]:
        console.warn(f"the judge does not know {token}: say --token '{token}=NOUN'")
    if record["removed_tokens"]:
        names = " and ".join(record["removed_tokens"])
        console.warn(f"{names} removed: where no class noun follows, say --token '<TOKEN>=NOUN'")
    if record["without_prompt"]:
        console.warn(f"{record['without_prompt']} pictures hold no prompt: give --prompt")
    console.say(f"{record['pictures']} pictures, judged by {record['clip']}")
    console.table(["", "mean"], [[name, value] for name, value in figures(record).items()])
    if hint:
        console.say(LITE_HINT)


def _default_references(name: str) -> Path:
    folder = Path("concepts") / name
    if not folder.is_dir():
        raise DataError(
            f"there are no references: {folder} does not exist", "give --references FOLDER"
        )
    return folder


def _token_and_noun(text: str) -> tuple[str, str]:
    from sbora_diffusion.core.schema import TOKEN_PATTERN

    token, _, noun = (part.strip() for part in text.partition("="))
    if not re.match(TOKEN_PATTERN, token) or not noun:
        raise ConfigError(f"--token {text!r} must be <TOKEN>=NOUN", "e.g. '<bear>=teddy bear'")
    return token, noun


def _refuse(options: dict[str, Any], reason: str) -> None:
    for name, value in options.items():
        if value is not None and value != []:
            raise ConfigError(f"--{name} {reason}", "leave it out")


def _refuse_missing(target: str) -> None:
    """A path, unlike a concept's name, means a file or a folder that must be there."""
    places = (target, target.rpartition(":")[0])
    if (os.sep in target or "/" in target) and not any(Path(p).exists() for p in places if p):
        raise DataError(f"{target} does not exist", "give a concept file or a folder with pictures")
