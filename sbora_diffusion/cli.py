"""The command `sbora`. What is heavy is imported inside the commands, so that help is quick."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion import __version__
from sbora_diffusion.cli_evaluate import evaluate
from sbora_diffusion.cli_library import inspect, library_app
from sbora_diffusion.console import (
    BaseOption,
    ConfigOption,
    Console,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LibraryOption,
    SetOption,
    open_base,
    quiet_libraries,
    read_settings,
    run,
)
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library, Reservation

if TYPE_CHECKING:
    from PIL.Image import Image

    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.diffusion.concepts import Subject
    from sbora_diffusion.diffusion.training import ConceptTraining
    from sbora_diffusion.jobs import TrainResult

WeightedConcepts = list[tuple["Concept", float]]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a text-to-image model several subjects from a few pictures each (SBoRA).",
)
app.add_typer(library_app, name="library", help="The concepts known here, their slots and files.")
app.command()(inspect)
app.command()(evaluate)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with 0 done, 2 wrong input, 1 a fault, 130 stopped."""
    sys.exit(run(app, arguments))


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Folder with concept.toml and pictures")],
    output: Annotated[Path | None, typer.Option("-o", "--output")] = None,
    base: BaseOption = None,
    variant: Annotated[str | None, typer.Option(help="fa (columns) or fb (rows)")] = None,
    rank: Annotated[int | None, typer.Option(help="Indices per layer")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    slot: Annotated[int | None, typer.Option(help="By default the next free one")] = None,
    sample_every: Annotated[int, typer.Option(min=0, help="Draw every N steps, 0: never")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.fp32,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn one subject from the pictures in a folder: writes one concept file."""
    from sbora_diffusion.diffusion.concepts import read_subject
    from sbora_diffusion.diffusion.config import TrainConfig
    from sbora_diffusion.jobs import train_concept
    from sbora_diffusion.outputs import check_concept_output

    console = Console(as_json)
    flags = {"variant": variant, "rank": rank, "steps": steps, "seed": seed}
    recipe = read_settings(TrainConfig, config, settings, flags)
    subject = read_subject(folder)
    output = output or Path(f"{subject.settings.name}.safetensors")
    check_concept_output(output)
    model = open_base(base or "pocket", device, dtype)

    with console.progress("training") as bar:
        result = train_concept(
            model,
            subject,
            recipe,
            library=Library(library),
            output=output,
            slot=slot,
            on_start=lambda training, range_: console.say(_introduction(training, range_)),
            on_record=lambda r: bar(r.step, r.steps, f"loss {r.loss:.3f}"),
            sample_every=sample_every,
        )
    for warning in result.warnings:
        console.warn(warning)
    console.say(
        f"{result.path} ({result.path.stat().st_size / 1024:.0f} KiB) in {result.seconds:.0f} s, "
        f"loss {result.loss_first:.3f} → {result.loss_last:.3f}"
    )
    console.say(
        f'next: sbora generate "a photo of {subject.settings.token} on the beach" '
        f"--concept {result.path}{_base_flag(base)}"
    )
    console.result({**_trained(result, subject), "training": recipe.model_dump(mode="json")})


@app.command()
def merge(
    concepts: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]…")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model folder")],
    form: Annotated[
        str, typer.Option("--as", help="model: a folder for stock diffusers")
    ] = "model",
    base: BaseOption = None,
    allow_overlap: Annotated[bool, typer.Option(help="Accept shared indices")] = False,
    device: DeviceOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Numbers that are written")] = Dtype.fp32,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fold concepts into their base: writes a model folder that stock diffusers loads."""
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.diffusion.merging import Merged
    from sbora_diffusion.jobs import load_concepts
    from sbora_diffusion.outputs import check_model_output

    console = Console(as_json)
    if form != "model":
        raise ConfigError(f"--as {form} does not exist", "model is the only form so far")
    check_model_output(output)
    loaded = load_concepts(concepts, Library(library))
    names = base or next((c.meta.base_name for c, _ in loaded if c.meta.base_name), None)
    if names is None:
        raise ConfigError("the concept files do not name their base", "give it with --base")
    merged = Merged(open_base(names, device), loaded, allow_overlap)
    if merged.rounded:
        console.warn("some concepts were trained on a rounded copy of this base")
    merged.save(output, DTYPES[dtype])
    tokens = [entry.token for concept, _ in loaded for entry in concept.meta.tokens]
    console.say(f"{output}: {len(loaded)} concepts in one model of {names}, {dtype}")
    console.say(f'next: sbora generate "{" next to ".join(tokens)}" --base {output}')
    console.result(
        {
            "folder": str(output),
            "base": names,
            "dtype": str(dtype),
            "rounded_base": merged.rounded,
            "concepts": [{"name": c.meta.name, "weight": weight} for c, weight in loaded],
        }
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="With the tokens of the concepts in it")],
    concept: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="May be repeated")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("picture.png"),
    base: BaseOption = None,
    seed: Annotated[int | None, typer.Option(help="Picture k uses seed + k")] = None,
    num: Annotated[int | None, typer.Option(help="How many pictures")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.fp32,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw pictures of a prompt: PNG files with their parameters inside."""
    from sbora_diffusion.diffusion.config import DrawConfig
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline
    from sbora_diffusion.jobs import load_concepts
    from sbora_diffusion.outputs import check_writable, picture_files
    from sbora_diffusion.pictures import words_cut_off

    console = Console(as_json)
    flags = {"seed": seed, "num": num, "steps": steps, "guidance": guidance}
    drawing = read_settings(DrawConfig, config, settings, {**flags, "negative_prompt": negative})
    files = picture_files(output, drawing.num)
    check_writable(files[0])
    loaded = load_concepts(concept or [], Library(library))
    named = next((c.meta.base_name for c, _ in loaded if c.meta.base_name), "pocket")
    pipeline = ConceptPipeline(open_base(base or named, device, dtype))
    for item, weight in loaded:
        if pipeline.add(item, weight):
            console.warn(f"{item.meta.name} was trained on a rounded copy of this base")
    for name in pipeline.unmentioned(prompt):
        token = pipeline.concepts[name].meta.tokens[0].token
        console.warn(f"the prompt does not mention {name}: write {token} where it shall appear")
    if cut := words_cut_off(pipeline.base, prompt):
        console.warn(f"the prompt is too long, its end is not read: {cut[:200]!r}")
    with console.progress("drawing") as bar:
        pictures = pipeline.generate(prompt, **drawing.model_dump(), on_step=bar)
    parameters = _save(pipeline, prompt, loaded, drawing, pictures, files)
    console.say("\n".join(map(str, files)))
    console.result({"files": [str(file) for file in files], "pictures": parameters})


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that it makes")] = Path("outputs/demo"),
    device: DeviceOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach the pocket base two subjects, merge them, and draw what came out."""
    from sbora_diffusion.demo import STEPS, run_demo
    from sbora_diffusion.diffusion.config import TrainConfig

    console = Console(as_json)
    recipe = read_settings(TrainConfig, None, [f"steps={STEPS}", *(settings or [])], {})
    console.result(run_demo(open_base("pocket", device), out, console, recipe))


@app.command("app")
def serve(
    listen: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 7860,
    auth: Annotated[str | None, typer.Option(metavar="NAME:PASSWORD")] = None,
    library: LibraryOption = None,
) -> None:
    """Open the page to draw with concepts in a browser."""
    quiet_libraries()
    try:
        from sbora_diffusion import webui
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("the app needs gradio", "pip install 'sbora-diffusion[ui]'") from error
    webui.main(listen, port, auth, library)


def _introduction(training: "ConceptTraining", range_: Reservation) -> str:
    config, total = training.config, len(training.adapted)
    return (
        f"{training.subject.settings.name}: {len(training.subject.images)} pictures, "
        f"base {training.base.reference}, SBoRA-{config.variant.upper()}, rank {config.rank}, "
        f"slot {range_.slot} (indices {range_.start} to {range_.stop - 1}), "
        f"adapted {total} of {len(training.layers)} attention layers"
    )


def _trained(result: "TrainResult", subject: "Subject") -> dict[str, Any]:
    return {
        "file": str(result.path),
        "name": subject.settings.name,
        "token": subject.settings.token,
        "digest": result.digest,
        **asdict(result.reservation),
        "seconds": round(result.seconds, 2),
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
    }


def _base_flag(base: str | None) -> str:
    return f" --base {base}" if base and base != "pocket" else ""


def _save(
    pipeline: Any,
    prompt: str,
    concepts: WeightedConcepts,
    drawing: Any,
    pictures: "list[Image]",
    files: list[Path],
) -> list[dict[str, Any]]:
    from sbora_diffusion.pictures import picture_parameters, save_png

    options = drawing.model_dump(exclude={"num", "seed"})
    saved = []
    for k, (picture, file) in enumerate(zip(pictures, files, strict=True)):
        seed = drawing.seed + k
        parameters = picture_parameters(pipeline.base, prompt, concepts, seed=seed, **options)
        save_png(picture, file, parameters)
        saved.append(parameters)
    return saved
