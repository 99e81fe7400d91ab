"""Concepts in other tools' files, and back: `sbora export` and `sbora import`."""

import re
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
    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.core.concept_set import ConceptSet
    from sbora_diffusion.core.projection import Kept, Projection


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


def bring_in(
    source: Annotated[Path, typer.Argument(help="A LoRA file, an export or a PEFT folder")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The concept file; of published code a folder")
    ],
    project: Annotated[
        str | None,
        typer.Option(metavar="CONCEPT", help="Project an ordinary LoRA onto its indices"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the concept; by default the source's")
    ] = None,
    class_noun: Annotated[
        str, typer.Option(help="What it is, where the source does not say")
    ] = "object",
    base: BaseOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make concept files of exports, of PEFT folders and, projected, of ordinary LoRAs."""
    quiet_libraries()
    from sbora_diffusion.core.published import is_published
    from sbora_diffusion.diffusion.imports import is_adapter

    console = Console(as_json)
    if not source.exists():
        raise ConfigError(f"{source} does not exist", "check the path")
    if project:
        found = _project(console, source, project, _name(name, source), Library(library))
        facts = _save_one(console, found.concept, output)
        facts["loss"] = _losses(found)
    elif is_published(source):
        facts = _import_published(console, source, output)
    elif is_adapter(source):
        facts = _import_adapter(console, source, output, base, _name(name, source), class_noun)
    else:
        facts = _import_export(console, source, output)
    console.result(facts)


def _name(name: str | None, source: Path) -> str:
    """The name given, or the source's own with what a name cannot have replaced."""
    from sbora_diffusion.core.schema import NAME_PATTERN

    found = name or re.sub(r"[^A-Za-z0-9_-]+", "_", source.stem)
    if not re.fullmatch(NAME_PATTERN, found):
        raise ConfigError(f"{found!r} is no name of a concept", "give one with --name")
    return found


def _save_one(console: Console, concept: "Concept", output: Path) -> dict[str, Any]:
    from sbora_diffusion.core.concept import write_concept
    from sbora_diffusion.outputs import check_concept_output, make_parent

    check_concept_output(output)
    make_parent(output)
    digest = write_concept(output, concept)
    meta = concept.meta
    console.say(
        f"{output}: {meta.name}, SBoRA-{meta.variant.upper()}, rank {meta.rank}, indices "
        f"{meta.start} to {meta.stop - 1}, {len(concept.layers)} layers"
    )
    return {"file": str(output), "name": meta.name, "digest": digest}


def _import_export(console: Console, source: Path, output: Path) -> dict[str, Any]:
    from sbora_diffusion.core.concept_set import write_concept_set
    from sbora_diffusion.diffusion.imports import import_export
    from sbora_diffusion.outputs import check_concept_output, make_parent

    found = import_export(source)
    if len(found.concepts) == 1 and found.concepts[0][1] == 1.0:
        return _save_one(console, found.concepts[0][0], output)
    check_concept_output(output)
    make_parent(output)
    digest = write_concept_set(output, found.concepts, found.allow_overlap)
    console.say(f"{output}: {len(found.concepts)} concepts in one set")
    listed = [{"name": c.meta.name, "weight": weight} for c, weight in found.concepts]
    return {"file": str(output), "digest": digest, "concepts": listed}


def _import_published(console: Console, source: Path, output: Path) -> dict[str, Any]:
    from sbora_diffusion.core.published import import_published
    from sbora_diffusion.outputs import check_model_output

    check_model_output(output)
    layers = import_published(source, output)
    console.say(f"{output}: an adapter on {layers} layers for this package's PEFT tuner")
    console.say("load it with PeftModel.from_pretrained after `import sbora_diffusion`")
    return {"folder": str(output), "layers": layers}


def _import_adapter(
    console: Console, source: Path, output: Path, base: str | None, name: str, class_noun: str
) -> dict[str, Any]:
    from sbora_diffusion.diffusion.imports import import_adapter

    if base is None:
        raise ConfigError("an adapter does not say its base", "give it with --base")
    concept = import_adapter(source, open_base(base, "cpu"), name, class_noun)
    return _save_one(console, concept, output)


def _project(
    console: Console, source: Path, onto: str, name: str, library: Library
) -> "Projection":
    from sbora_diffusion.core.projection import project
    from sbora_diffusion.diffusion.lora_files import read_lora
    from sbora_diffusion.lookup import load_concepts

    templates = load_concepts([onto], library)
    if len(templates) != 1:
        raise ConfigError(f"{onto} holds {len(templates)} concepts", "name one of them")
    found = project(read_lora(source).layers, templates[0][0], name)
    rows = [_row(kind, kept) for kind, kept in [*found.kept.items(), ("all", found.overall)]]
    console.table(["layers", "number", "of the concept", "lost of ‖ΔW‖"], rows)
    return found


def _row(kind: str, kept: "Kept") -> list[str]:
    return [kind, str(kept.layers), str(kept.matched), f"{kept.loss:.1%}"]


def _losses(found: "Projection") -> dict[str, float]:
    losses = {kind: kept.loss for kind, kept in found.kept.items()}
    return {**losses, "all": found.overall.loss}
