"""The commands that measure: `sbora bench speed`, and those of `cli_methods`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.cli_methods import figure, merge, single, tune
from sbora_diffusion.console import (
    ConfigOption,
    Console,
    DeviceOption,
    JsonOption,
    SetOption,
    quiet_libraries,
    read_settings,
)
from sbora_diffusion.core.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from sbora_diffusion.bench.plan import Plan

bench_app = typer.Typer(rich_markup_mode=None)
for study in (tune, single, merge, figure):
    bench_app.command()(study)


@bench_app.command()
def speed(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION[,…]",
            help="layer, merging, mixed_batch, step, training; by default all, on a CPU all but "
            "training",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE[,…]",
            help="sd15, sdxl, llama8b, pocket, tiny; by default sd15 on a GPU, pocket elsewhere",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[,…]",
            help="e.g. sbora_fa_folded,lora; the frozen model is always there; by default all",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also under torch.compile, which takes minutes")
    ] = False,
    graphs: Annotated[bool, typer.Option(help="Also as CUDA graphs of the whole step")] = False,
    limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of the whole run; nothing new begins after these"),
    ] = None,
    device: DeviceOption = None,
    out: Annotated[Path, typer.Option(help="The record")] = Path("results/speed.json"),
    commit: Annotated[
        str | None, typer.Option(help="Of the code, where there is no checkout")
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option(metavar="RECORD", help="Measure nothing: write a record's .md and .png again"),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of training and merging, against the frozen model and other adapters.

    The record is written as it grows, at the end with a page and a picture beside it.
    """
    console = Console(as_json)
    if render:
        given = {"--only": only, "--shapes": shapes, "--methods": methods, "--config": config}
        more = {"--set": settings, "--compile": compiled, "--graphs": graphs, "--limit": limit}
        _refuse({**given, **more})
        _render(console, render)
        return
    quiet_libraries()
    from sbora_diffusion.bench.plan import make_plan
    from sbora_diffusion.bench.settings import SpeedConfig
    from sbora_diffusion.diffusion.bases import best_device

    _check_output(out)
    recipe = read_settings(SpeedConfig, config, settings, {"limit": limit})
    wanted = [mode for mode, on in (("compiled", compiled), ("graphs", graphs)) if on]
    modes = list(dict.fromkeys([*recipe.modes, *wanted]))
    recipe = recipe.model_copy(update={"modes": modes})
    plan = make_plan(recipe, device or best_device(), only or (), shapes or (), methods or ())
    _measure(console, plan, out, commit)


def _measure(console: Console, plan: "Plan", out: Path, commit: str | None) -> None:
    from sbora_diffusion.bench.report import tables
    from sbora_diffusion.bench.speed import run_speed
    from sbora_diffusion.core.storage import write_atomically
    from sbora_diffusion.outputs import make_parent

    for name, reason in plan.absent.items():
        console.warn(f"{name} is left out: {reason}")
    command = shlex.join(["sbora", *sys.argv[1:]])

    def keep(record: dict[str, Any]) -> None:
        make_parent(out)
        write_atomically(out, _json_bytes(record))

    with console.progress("measuring") as bar:
        record = run_speed(plan, command, commit, on_step=bar, on_part=keep)
    keep(record)
    for table in tables(record):
        console.say(f"\n{table.title}")
        console.table(table.columns, table.rows)
    for file in (out, *_rendered(out, record)):
        console.say(str(file))
    console.result(record)


def _render(console: Console, path: Path) -> None:
    from sbora_diffusion.bench.report import read_record

    files = [str(file) for file in _rendered(path, read_record(path))]
    for file in files:
        console.say(file)
    console.result({"files": files})


def _rendered(path: Path, record: dict[str, Any]) -> list[Path]:
    """Write a page and a picture beside the record."""
    from sbora_diffusion.bench.picture import png_bytes, speed_picture
    from sbora_diffusion.bench.report import markdown
    from sbora_diffusion.core.storage import write_atomically

    files = {
        path.with_suffix(".md"): markdown(record).encode(),
        path.with_suffix(".png"): png_bytes(speed_picture(record)),
    }
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)


def _check_output(out: Path) -> None:
    """Refuse what could not be written, or would destroy another file."""
    from sbora_diffusion.bench.report import read_record
    from sbora_diffusion.outputs import check_writable

    if out.suffix != ".json":
        raise ConfigError(f"output {out} must end in .json", f"e.g. {out}.json")
    check_writable(out)
    if out.exists():
        try:
            read_record(out)
        except FormatError as error:
            raise ConfigError(
                f"{out} exists and is no record of this benchmark", "choose another --out"
            ) from error


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name} is for measuring, --render measures nothing", "leave it out")


def _json_bytes(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
