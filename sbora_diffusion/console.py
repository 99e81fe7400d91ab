"""What all commands share: their options, what they print, and how they end."""

import errno
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.core.errors import SboraError
from sbora_diffusion.core.settings import Settings, parse_overrides, read_toml, validate

if TYPE_CHECKING:
    from sbora_diffusion.diffusion.bases import Base

# Typer 0.2x brings its own copy of click, so the class is reached through typer.
UsageError: Any = typer.BadParameter.__base__

OK, FAULT, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
PROGRESS_FILE = "SBORA_PROGRESS"
"""Names the environment variable with a file that gets a line of JSON at each report."""


class Dtype(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="pocket, a hub id, a folder in diffusers layout (also a merged one) or a "
        ".safetensors checkpoint. By default the base that the concepts name, else pocket.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps …; the best one present by default")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Numbers that the model computes in")]
LibraryOption = Annotated[
    Path | None,
    typer.Option(
        "--library",
        help="The library file; by default $SBORA_LIBRARY, else in the user's data folder",
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A TOML file with settings")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="One setting; may be repeated"),
]
GraphsOption = Annotated[
    bool, typer.Option(help="On CUDA, record the work once and replay it, which is faster")
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Run UNet and text encoder through torch.compile"),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On CUDA, add in a fixed order, so that the same training gives the same bytes",
    ),
]
OffloadOption = Annotated[
    bool,
    typer.Option("--offload", help="Let models wait in the CPU's memory until they work"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]


class Console:
    """Where a command talks: results on stdout, warnings and progress on stderr.

    Args:
        as_json: stdout gets one JSON object and nothing else; what is said goes to stderr.
        silent: another process says the same.
    """

    def __init__(self, as_json: bool = False, silent: bool = False):
        self.as_json, self.silent = as_json, silent
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self._echo(text, self.as_json)

    def note(self, text: str) -> None:
        """What is good to know, but no result."""
        self._echo(text, True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._echo(f"warning: {text}", True)

    def _echo(self, text: str, to_stderr: bool) -> None:
        if not self.silent:
            typer.echo(text, err=to_stderr)

    def result(self, document: dict[str, Any]) -> None:
        """Print the machine-readable result, if that was asked for."""
        if self.as_json:
            self._echo(json.dumps({**document, "warnings": self.warnings}, indent=2), False)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Columns as wide as their content; the last one is never cut."""
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            self.say("  ".join(cells).rstrip())

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[..., None]]:
        """A bar with the time left, on a terminal; gives (done, total, note="") → None.

        Whoever started this process may read along, see `PROGRESS_FILE`.
        """
        from rich import console, progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeRemainingColumn(),
        )
        screen = console.Console(stderr=True)
        shown = screen.is_terminal and not self.silent
        with progress.Progress(*columns, console=screen, disable=not shown) as bar:
            task = bar.add_task(what, total=None, note="")

            def report(done: int, total: int, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)
                _log_progress(what, done, total, note)

            yield report


def _log_progress(what: str, done: int, total: int, note: str) -> None:
    if file := os.environ.get(PROGRESS_FILE):
        line = {"what": what, "done": done, "total": total, "note": note, "time": time.time()}
        with open(file, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def quiet_libraries(names: Sequence[str] = ("diffusers", "transformers")) -> None:
    """Silence the chatter and the bars of the libraries below; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_bitsandbytes()
    for library in map(import_module, names):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def quiet_bitsandbytes() -> None:
    """Silence what it says, when PEFT imports it, of kernels that it does without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def open_base(
    reference: str,
    device: str | None,
    dtype: str = "fp32",
    graphs: bool = True,
    compiled: bool = False,
    *,
    deterministic: bool = False,
    offloaded: bool = False,
) -> "Base":
    """Load a base, quietly."""
    quiet_libraries()
    from sbora_diffusion.diffusion import bases, runtime

    how = runtime.Runtime(graphs, compiled, deterministic, offloaded)
    return bases.load_base(reference, device, dtype, how)


def read_settings(
    model: type[Settings],
    file: Path | None,
    pairs: list[str] | None,
    flags: dict[str, Any],
    preset: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from a preset, a TOML file, `-s key=value`, then the options of their own name.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    values = read_toml(file) if file else {}
    validate(model, values, str(file))
    given = {key: value for key, value in flags.items() if value is not None}
    overrides = parse_overrides(pairs or [])
    return validate(model, {**(preset or {}), **values, **overrides, **given}, "settings")


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a command and give its exit status: 0 done, 2 wrong input, 1 a fault, 130 stopped."""
    warnings.simplefilter("ignore")
    quiet_bitsandbytes()
    try:
        return app(args=arguments, prog_name="sbora", standalone_mode=False) or OK
    except (KeyboardInterrupt, typer.Abort):
        return _end("stopped", INTERRUPTED)
    except UsageError as error:
        return _end(f"{error.format_message()} See `sbora --help`.", WRONG_INPUT)
    except SboraError as error:
        return _end(str(error), WRONG_INPUT)
    except OSError as error:
        return _end(_about(error), WRONG_INPUT)
    except Exception as error:
        return _fault(error)


def _fault(error: Exception) -> int:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return _end("memory is full; use a smaller batch_size, --num or --dtype", WRONG_INPUT)
    if os.environ.get("SBORA_DEBUG") == "1":
        traceback.print_exc()
        return FAULT
    hint = "a fault of the program; SBORA_DEBUG=1 shows where"
    return _end(f"{type(error).__name__}: {error}; {hint}", FAULT)


def _about(error: OSError) -> str:
    reason = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename else ""
    remedy = "; make room" if error.errno == errno.ENOSPC else ""
    return f"{place}{reason}{remedy}"


def _end(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status
