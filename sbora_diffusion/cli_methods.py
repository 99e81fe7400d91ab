"""The commands that compare methods: `sbora bench tune`, `single`, `merge` and `figure`."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sbora_diffusion.console import (
    ConfigOption,
    Console,
    DeviceOption,
    JsonOption,
    SetOption,
    open_base,
    quiet_libraries,
)
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.settings import parse_overrides

if TYPE_CHECKING:
    from sbora_diffusion.comparison.preset import Preset
    from sbora_diffusion.comparison.work import Progress, Work

PresetOption = Annotated[
    str, typer.Option(help="pocket, paper or a TOML file: what is compared, drawn and judged")
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[,…]", help="Of the preset's methods; by default all"),
]
SeedsOption = Annotated[
    str | None, typer.Option(metavar="N[,…]", help="Of the trainings; by default the preset's")
]
ConceptsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[,…]", help="Of the preset's concepts; by default all"),
]
BaseOption = Annotated[str | None, typer.Option(help="In place of the preset's base")]
ClipOption = Annotated[
    str | None, typer.Option(metavar="MODEL[:PRETRAINED]", help="In place of the preset's judge")
]
PartOption = Annotated[int, typer.Option(help="Which share of the work is this process's")]
PartsOption = Annotated[int, typer.Option(help="How many processes share the work")]
LimitOption = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Nothing new begins after these; run again to go on"),
]
CommitOption = Annotated[str | None, typer.Option(help="Of the code, where there is no checkout")]
FilesOption = Annotated[Path, typer.Option(help="Where trained concepts are kept")]
PicturesOption = Annotated[
    Path | None, typer.Option(help="A folder for all that is drawn; by default nothing is kept")
]
RenderOption = Annotated[
    bool, typer.Option("--render", help="Measure nothing: write tables and plot from the record")
]
PageOption = Annotated[Path | None, typer.Option(help="In place of the preset's page")]
FILES = Path("build/methods")
NOTE_EVERY = 20.0
"""Seconds between notes of progress where there is no terminal."""


def _measuring(kind: Literal["single", "merge"], about: str) -> Callable[..., None]:
    """A command whose record grows line by line."""

    def command(
        preset: PresetOption = "pocket",
        methods: MethodsOption = None,
        seeds: SeedsOption = None,
        concepts: ConceptsOption = None,
        base: BaseOption = None,
        clip: ClipOption = None,
        device: DeviceOption = None,
        part: PartOption = 1,
        parts: PartsOption = 1,
        limit: LimitOption = None,
        out: Annotated[Path, typer.Option(help="The record's folder")] = Path("results", kind),
        files: FilesOption = FILES,
        pictures: PicturesOption = None,
        render: RenderOption = False,
        page: PageOption = None,
        commit: CommitOption = None,
        config: ConfigOption = None,
        settings: SetOption = None,
        as_json: JsonOption = False,
    ) -> None:
        console, found = Console(as_json), _preset(preset, config, settings, base, clip)
        from sbora_diffusion.comparison.merge import run_merge
        from sbora_diffusion.comparison.single import run_single

        if render:
            return _render(console, found, kind, out, page)
        run = {"single": run_single, "merge": run_merge}[kind]
        share = {"part": part, "parts": parts, "limit": limit, "commit": commit}
        chosen = {"methods": methods or (), "concepts": concepts or (), "seeds": _numbers(seeds)}
        places = {"out": out, "files": files, "pictures": pictures}
        _run(console, _work(found, device, **share, **chosen, **places), run)

    command.__name__ = kind
    command.__doc__ = (
        f"{about}\n\nThe record grows line by line. What it has is not measured again."
    )
    return command


single = _measuring("single", "Each concept alone, by every method: text and image alignment.")
merge = _measuring(
    "merge", "What merging a few and all concepts costs each method, in each of its ways."
)


def tune(
    preset: PresetOption = "pocket",
    methods: MethodsOption = None,
    base: BaseOption = None,
    clip: ClipOption = None,
    device: DeviceOption = None,
    part: PartOption = 1,
    parts: PartsOption = 1,
    limit: LimitOption = None,
    out: Annotated[Path, typer.Option(help="The folder of the trials")] = Path("results/tuning"),
    render: Annotated[
        bool,
        typer.Option("--render", help="Measure nothing: choose from the trials, write the table"),
    ] = False,
    page: PageOption = None,
    commit: CommitOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learning rates and steps of each method, by as many trials for each, on other subjects.

    `--render` writes what won where `sbora bench single` and `merge` read it.
    """
    console, found = Console(as_json), _preset(preset, config, settings, base, clip)
    from sbora_diffusion.comparison.opening import to_tune
    from sbora_diffusion.comparison.tuning import run_tuning

    if render:
        return _choose(console, found, out, page)
    options = {"part": part, "parts": parts, "limit": limit, "methods": methods or ()}
    work = _work(to_tune(found), device, out=out, files=FILES, commit=commit, **options)
    _run(console, work, run_tuning)


def figure(
    output: Annotated[Path, typer.Option("-o", "--output", help="A PNG")],
    preset: PresetOption = "pocket",
    methods: MethodsOption = None,
    concepts: ConceptsOption = None,
    prompts: Annotated[
        str, typer.Option(metavar="N[,…]", help="Numbers of the concepts' twenty prompts, from 0")
    ] = "0,5,10,15",
    seed: Annotated[int | None, typer.Option(help="Of the trainings; the preset's first")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="All concepts in one model, by each method's own merge")
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    files: FilesOption = FILES,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """References left, one column for each method: the same prompts from the same seeds."""
    console, found = Console(as_json), _preset(preset, config, settings, base, None)
    from sbora_diffusion.comparison.figure import figure as draw_figure
    from sbora_diffusion.outputs import check_picture_output
    from sbora_diffusion.pictures import save_png

    check_picture_output(output)
    numbers, chosen = _numbers(prompts), {"methods": methods or (), "concepts": concepts or ()}
    work = _work(found, device, out=output.parent, files=files, judged=False, commit="-", **chosen)
    with console.progress("drawing") as bar:
        work = replace(work, progress=_progress(console, bar, work.progress.ends))
        sheet = draw_figure(work, found.seeds[0] if seed is None else seed, numbers, merged)
    save_png(sheet, output, {"preset": found.name, "methods": list(work.entries)})
    console.say(str(output))
    console.result({"file": str(output)})


def _preset(
    name: str,
    file: Path | None,
    pairs: list[str] | None,
    base: str | None,
    clip: str | None,
) -> "Preset":
    quiet_libraries()
    from sbora_diffusion.comparison.preset import load_preset

    flags = {"base": base, "clip": clip}
    given = {key: value for key, value in flags.items() if value is not None}
    return load_preset(name, file, {**parse_overrides(pairs or []), **given})


def _work(preset: "Preset", device: str | None, **options: Any) -> "Work":
    from sbora_diffusion.comparison.opening import Asked, open_work
    from sbora_diffusion.diffusion.bases import best_device

    asked = Asked(command=shlex.join(["sbora", *sys.argv[1:]]), **options)
    return open_work(preset, lambda: open_base(preset.base, device or best_device()), asked)


def _run(console: Console, work: "Work", run: "Callable[[Work], None]") -> None:
    with console.progress("measuring") as bar:
        work = replace(work, progress=_progress(console, bar, work.progress.ends))
        run(work)
    done, left = work.progress.done, work.progress.total - work.progress.done
    text = f"{done} lines in {work.record.file}"
    console.say(f"{text}, {left} left: run it again to go on" if left else text)
    console.result({"file": str(work.record.file), "lines": done, "left": left})


def _progress(console: Console, bar: Callable[..., None], ends: float) -> "Progress":
    """Shown as a bar, and where there is no terminal as a note now and then."""
    from sbora_diffusion.comparison.work import Progress

    began = time.monotonic()
    last = [began]

    def report(done: int, total: int, note: str) -> None:
        bar(done, total, note)
        now = time.monotonic()
        if not sys.stderr.isatty() and now - last[0] >= NOTE_EVERY:
            last[0] = now
            left = f", about {(now - began) / done * (total - done):.0f} s left" if done else ""
            console.note(f"[{now - began:6.0f} s] {done} of {total} lines{left}: {note}")

    return Progress(report, ends)


def _render(console: Console, preset: "Preset", kind: str, folder: Path, page: Path | None) -> None:
    from sbora_diffusion.comparison.page import render

    _say_files(console, render(preset, kind, folder, page or preset.page))


def _choose(console: Console, preset: "Preset", folder: Path, page: Path | None) -> None:
    from sbora_diffusion.comparison.lines import read_lines
    from sbora_diffusion.comparison.page import render_tuning
    from sbora_diffusion.comparison.tuning import tuned_record
    from sbora_diffusion.core.storage import write_atomically
    from sbora_diffusion.outputs import make_parent

    record = tuned_record(preset, read_lines(folder))
    if preset.tuned is None:
        raise ConfigError(f"preset {preset.name} names no file for what is tuned", "set `tuned`")
    make_parent(preset.tuned)
    write_atomically(preset.tuned, (json.dumps(record, indent=1) + "\n").encode())
    _say_files(console, [preset.tuned, render_tuning(preset, record, page or preset.page)])


def _say_files(console: Console, files: list[Path]) -> None:
    for file in files:
        console.say(str(file))
    console.result({"files": [str(file) for file in files]})


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"{text!r} must be numbers", "e.g. 0,1,2") from error
