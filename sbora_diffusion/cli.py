"""The command `sbora`. What is heavy is imported inside the commands, so that help is quick."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion import __version__
from sbora_diffusion.cli_check import check
from sbora_diffusion.cli_evaluate import evaluate
from sbora_diffusion.cli_generate import generate
from sbora_diffusion.cli_library import inspect, library_app
from sbora_diffusion.cli_merge import merge
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
    from sbora_diffusion.diffusion.concepts import Subject
    from sbora_diffusion.diffusion.training import ConceptTraining
    from sbora_diffusion.jobs import TrainResult

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a text-to-image model several subjects from a few pictures each (SBoRA).",
)
app.add_typer(library_app, name="library", help="The concepts known here, their slots and files.")
app.command()(inspect)
app.command()(check)
app.command()(merge)
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
