"""The commands `sbora llm merge` and `sbora llm export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.console import Console, JsonOption, quiet_libraries
from sbora_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    from sbora_diffusion.core.llm.adapters import TaskAdapter

BaseModelOption = Annotated[
    str | None, typer.Option("--base", help="By default the one that the adapters name")
]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="A folder")]


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Folders; FOLDER:0.8 weighs one less")],
    output: OutputOption,
    base: BaseModelOption = None,
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="16-bit; for adapters of an NF4 base also overlay (exact) or nf4 (loses updates)",
        ),
    ] = "16-bit",
    dtype: Annotated[str, typer.Option(help="Of a 16-bit model: bf16, fp16 or fp32")] = "bf16",
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Add up what several adapters own")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters and their base into one model, exactly."""
    quiet_libraries(["transformers"])
    from sbora_diffusion.core.llm.loading import DTYPES, load_tokenizer
    from sbora_diffusion.core.llm.merging import (
        FORMS,
        merge_record,
        merged_model,
        nf4_model,
        overlaid_model,
        write_model,
    )

    console = Console(as_json)
    if form not in FORMS or dtype not in DTYPES:
        raise ConfigError(f"--as {form} --dtype {dtype} is unknown", "see `sbora llm merge --help`")
    tasks = [_adapter(text) for text in adapters]
    place = _base_of(tasks, base)
    loss = None
    if form == "16-bit":
        model = merged_model(place, tasks, dtype, allow_overlap)
    elif form == "overlay":
        model = overlaid_model(place, tasks, allow_overlap)
    else:
        model, loss = nf4_model(place, tasks, allow_overlap)
        console.warn(
            f"quantizing again changed the updates by {loss.lost:.0%} of their size, and "
            f"{loss.changed:.1%} of the entries that no adapter owns; --as overlay is exact"
        )
    record = merge_record(place, tasks, form, dtype)
    write_model(output, model, load_tokenizer(place), record)
    console.say(f"{output}: {place} with {len(tasks)} adapters, {form}")
    console.result({"model": str(output), **record, "loss": vars(loss) if loss else None})


def export(
    adapter: Annotated[Path, typer.Argument(help="A SBoRA adapter's folder")],
    output: OutputOption,
    base: BaseModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a SBoRA adapter as an ordinary LoRA, which vLLM and others read."""
    quiet_libraries(["transformers"])
    from sbora_diffusion.core.llm.adapters import export_lora, read_adapter
    from sbora_diffusion.core.llm.shapes import config_of, meta_model

    console = Console(as_json)
    task = read_adapter(adapter)
    place = _base_of([task], base)
    export_lora(task, meta_model(config_of(place)), output)
    console.say(f"{output}: a LoRA of rank {task.rank}, the same update")
    console.result({"adapter": str(output), "base": place})


def _adapter(text: str) -> "TaskAdapter":
    from sbora_diffusion.core.llm.adapters import read_adapter

    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return read_adapter(Path(text))
    try:
        return read_adapter(Path(path), float(weight))
    except ValueError as error:
        raise ConfigError(f"{weight!r} is no weight", "write FOLDER:0.8") from error


def _base_of(tasks: list["TaskAdapter"], base: str | None) -> str:
    named = sorted({task.base for task in tasks if task.base})
    if base is None and len(named) != 1:
        found = f"the adapters name {', '.join(named)}" if named else "no adapter names its base"
        raise ConfigError(found, "give --base")
    return base or named[0]
