"""The command `sbora`. What is heavy is imported inside the commands, so that help is quick."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion import __version__, team
from sbora_diffusion.cli_bench import bench_app
from sbora_diffusion.cli_check import check
from sbora_diffusion.cli_evaluate import evaluate
from sbora_diffusion.cli_formats import bring_in, export
from sbora_diffusion.cli_generate import generate
from sbora_diffusion.cli_library import inspect, library_app
from sbora_diffusion.cli_llm import llm_app
from sbora_diffusion.cli_merge import merge
from sbora_diffusion.console import (
    BaseOption,
    CompileOption,
    ConfigOption,
    Console,
    DeterministicOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    GraphsOption,
    JsonOption,
    LibraryOption,
    OffloadOption,
    SetOption,
    open_base,
    read_settings,
    run,
)
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library, Reservation
from sbora_diffusion.workers import slots_of, this_worker

if TYPE_CHECKING:
    from sbora_diffusion.checkpointing import Checkpointing
    from sbora_diffusion.diffusion.bases import Base
    from sbora_diffusion.diffusion.concepts import Subject
    from sbora_diffusion.diffusion.config import TrainConfig
    from sbora_diffusion.diffusion.training import ConceptTraining
    from sbora_diffusion.jobs import TrainResult

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a text-to-image model several subjects from a few pictures each (SBoRA).",
)
app.add_typer(library_app, name="library", help="The concepts known here, their slots and files.")
app.add_typer(bench_app, name="bench", help="The studies: what it costs, and how methods compare.")
app.add_typer(llm_app, name="llm", help="Language models: train, eval, merge, export, count.")
app.command()(inspect)
app.command()(check)
app.command()(merge)
app.command()(export)
app.command("import")(bring_in)
app.command()(generate)
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
    folders: Annotated[list[Path], typer.Argument(help="With concept.toml and pictures each")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file; for several subjects a folder")
    ] = None,
    base: BaseOption = None,
    variant: Annotated[str | None, typer.Option(help="fa (columns) or fb (rows)")] = None,
    rank: Annotated[int | None, typer.Option(help="Indices per layer")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    slot: Annotated[
        int | None,
        typer.Option(help="By default the next free one; several subjects take those that follow"),
    ] = None,
    sample_every: Annotated[int, typer.Option(min=0, help="Draw every N steps, 0: never")] = 0,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Subjects that train in one batch; 1 on a CPU, else up to 16"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was stopped")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Save the training every N steps, 0: never")
    ] = 100,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.fp32,
    graphs: GraphsOption = True,
    compiled: CompileOption = False,
    deterministic: DeterministicOption = False,
    offload: OffloadOption = False,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn subjects from the pictures in their folders: writes a concept file of each."""
    from sbora_diffusion.checkpointing import Checkpointing
    from sbora_diffusion.diffusion.concepts import read_subject
    from sbora_diffusion.diffusion.config import TrainConfig

    worker = this_worker(len(folders))
    console = Console(as_json, silent=not team.leads())
    how = Checkpointing(checkpoint_every, resume, console.note, console.warn)
    flags = {"variant": variant, "rank": rank, "steps": steps, "seed": seed}
    recipe = read_settings(TrainConfig, config, settings, flags)
    subjects = [read_subject(folder) for folder in folders]
    if len(subjects) > 1 and sample_every:
        raise ConfigError("--sample-every is for one subject", "leave it out")
    place = _output(output, subjects)
    for file in _replaced(place, subjects):
        console.warn(f"{file} exists and is replaced when the training is done")
    slots = slots_of([subject.settings.name for subject in subjects], slot, worker)
    several, subjects = len(subjects) > 1, worker.share(subjects)
    device, known = worker.device(device), Library(library)
    running = {"deterministic": deterministic, "offloaded": offload}
    model = open_base(base or "pocket", device, dtype, graphs, compiled, **running)
    if several:
        done = _train_many(console, model, subjects, recipe, known, place, at_once, slots, how)
    else:
        (subject,) = subjects
        done = [_train_one(console, model, subject, recipe, known, place, slot, sample_every, how)]
    for result, subject in zip(done, subjects, strict=True):
        if team.leads():
            _say_trained(console, result, subject, base)
    team.part()
    shown = [_trained(result, subject) for result, subject in zip(done, subjects, strict=True)]
    document = {"concepts": shown} if several else shown[0]
    console.result({**document, "training": recipe.model_dump(mode="json")})


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
    auth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:PASSWORD",
            help="Who may log in; may be repeated, each person then has a library of their own",
        ),
    ] = None,
    library: LibraryOption = None,
) -> None:
    """Open the app in a browser: draw, make concepts, train, merge, judge, export."""
    try:
        from sbora_diffusion.app import server
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("the app needs gradio", "pip install 'sbora-diffusion[ui]'") from error
    server.main(listen, port, auth or [], library)


def _output(output: Path | None, subjects: list["Subject"]) -> Path:
    """The concept file of one subject; the folder for those of several."""
    from sbora_diffusion.outputs import check_concept_output

    if len(subjects) > 1:
        if output and (output.suffix or output.is_file()):
            raise ConfigError(f"{output} is no folder for {len(subjects)} concepts", "give -o DIR/")
        return output or Path()
    place = output or Path(f"{subjects[0].settings.name}.safetensors")
    check_concept_output(place)
    return place


def _replaced(place: Path, subjects: list["Subject"]) -> list[Path]:
    """Concept files of an earlier training that this one will take the place of."""
    from sbora_diffusion.group_jobs import concept_file

    several = [concept_file(place, subject.settings.name) for subject in subjects]
    return [file for file in (several if len(subjects) > 1 else [place]) if file.exists()]


def _train_one(
    console: Console,
    model: "Base",
    subject: "Subject",
    recipe: "TrainConfig",
    library: Library,
    output: Path,
    slot: int | None,
    sample_every: int,
    checkpointing: "Checkpointing",
) -> "TrainResult":
    from sbora_diffusion.jobs import train_concept

    with console.progress("training") as bar:
        return train_concept(
            model,
            subject,
            recipe,
            library=library,
            output=output,
            slot=slot,
            on_start=lambda training, range_: console.say(_introduction(training, range_)),
            on_record=lambda r: bar(r.step, r.steps, f"loss {r.loss:.3f}"),
            sample_every=sample_every,
            checkpointing=checkpointing,
        )


def _train_many(
    console: Console,
    model: "Base",
    subjects: list["Subject"],
    recipe: "TrainConfig",
    library: Library,
    folder: Path,
    at_once: int | None,
    slots: dict[str, int] | None,
    checkpointing: "Checkpointing",
) -> list["TrainResult"]:
    from sbora_diffusion.group_jobs import train_concepts

    what = f"base {model.reference}, SBoRA-{recipe.variant.upper()}, rank {recipe.rank}"
    with console.progress("training") as bar:
        return train_concepts(
            model,
            subjects,
            recipe,
            library=library,
            folder=folder,
            at_once=at_once,
            slots=slots,
            on_start=lambda size: console.say(f"{len(subjects)} subjects, {size} at once, {what}"),
            on_step=lambda done, total, loss: bar(done, total, f"loss {loss:.3f}"),
            checkpointing=checkpointing,
        )


def _say_trained(
    console: Console, result: "TrainResult", subject: "Subject", base: str | None
) -> None:
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
