"""Concepts in other tools' files, and back: `sbora export` and `sbora import`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import (
    BaseOption,
    Console,
    DeviceOption,
    Dtype,
    JsonOption,
    LibraryOption,
    open_base,
    quiet_libraries,
)
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from sbora_diffusion.core.concept_set import ConceptSet


class To(StrEnum):
    kohya = "kohya"
    diffusers = "diffusers"
    peft = "peft"
    checkpoint = "checkpoint"


def export(
    concepts: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]…")],
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="kohya: a LoRA for ComfyUI, A1111, Forge; diffusers, peft: a LoRA for Python; "
            "checkpoint: a whole model, in one file if the base is one, else in diffusers' layout",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder")],
    base: BaseOption = None,
    allow_overlap: Annotated[bool, typer.Option(help="Accept shared indices")] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Numbers that are written; by default fp32, in a file the base's own"),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload the folder; a new repository is private"),
    ] = None,
    device: DeviceOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write concepts for other tools: a folder with the weights, embeddings and a model card."""
    quiet_libraries()
    from sbora_diffusion.core.concept_set import ConceptSet
    from sbora_diffusion.lookup import load_selection
    from sbora_diffusion.outputs import check_model_output

    console = Console(as_json)
    loaded = load_selection(concepts, Library(library))
    selection = ConceptSet(loaded.concepts, allow_overlap or loaded.allow_overlap)
    check_model_output(output)
    if to is To.checkpoint:
        _write_checkpoint(console, selection, output, base, device, dtype)
    else:
        _write_lora(selection, output, to, dtype or Dtype.fp32)
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    console.say(f"{output}: {len(selection.concepts)} concepts for {_READERS[to]}")
    console.say(f"how it is used: {output / 'README.md'}")
    facts: dict[str, Any] = {"folder": str(output), "to": str(to), "files": files}
    if push_to_hub:
        from sbora_diffusion.hub import push_to_hub as push

        facts["address"] = push(output, push_to_hub)
        console.say(f"uploaded to {facts['address']}")
    listed = [{"name": c.meta.name, "weight": weight} for c, weight in selection.concepts]
    console.result({**facts, "concepts": listed})


_READERS = {
    To.kohya: "ComfyUI, A1111, Forge and kohya's tools",
    To.diffusers: "diffusers",
    To.peft: "PEFT",
    To.checkpoint: "whatever runs the base",
}


def _write_lora(selection: "ConceptSet", output: Path, to: To, dtype: Dtype) -> None:
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.diffusion.formats import LoraForm, write_lora

    form: LoraForm = to.value  # type: ignore[assignment]
    write_lora(output, selection.concepts, selection.allow_overlap, DTYPES[dtype], form)


def _write_checkpoint(
    console: Console,
    selection: "ConceptSet",
    output: Path,
    base: str | None,
    device: str | None,
    dtype: Dtype | None,
) -> None:
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.diffusion.merging import Merged
    from sbora_diffusion.diffusion.single_file import write_single_file

    concepts, overlap = selection.concepts, selection.allow_overlap
    named = base or next((c.meta.base_name for c, _ in concepts if c.meta.base_name), None)
    if named is None:
        raise ConfigError("the concept files do not name their base", "give it with --base")
    if Path(named).is_file():
        chosen = DTYPES[dtype] if dtype else None
        rounded = write_single_file(output, Path(named), concepts, overlap, chosen)
    else:
        merged = Merged(open_base(named, device), concepts, overlap)
        merged.save(output, DTYPES[dtype or Dtype.fp32])
        rounded = merged.rounded
    if rounded:
        console.warn("some concepts were trained on a rounded copy of this base")
