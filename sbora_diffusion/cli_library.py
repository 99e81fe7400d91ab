"""The commands that look at concept files and at the library."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import BaseOption, Console, JsonOption, LibraryOption, open_base
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Entry, Library

if TYPE_CHECKING:
    from sbora_diffusion.core.concept import Concept

library_app = typer.Typer(rich_markup_mode=None)

KeyOption = Annotated[
    str | None, typer.Option("--base", help="Key of the base, as `sbora library list` shows it")
]
VariantOption = Annotated[str | None, typer.Option(help="fa or fb")]


@library_app.command("list")
def list_concepts(library: LibraryOption = None, as_json: JsonOption = False) -> None:
    """All known concepts, by base, variant and indices."""
    console, shelf = Console(as_json), Library(library)
    entries = shelf.concepts()
    if not entries:
        console.say(f"no concepts in {shelf.path} yet; `sbora train FOLDER` adds one")
    else:
        columns = ["name", "token", "variant", "slot", "indices", "base", "file"]
        console.table(columns, [_row(entry) for entry in entries])
    console.result({"library": str(shelf.path), "concepts": [_document(e) for e in entries]})


@library_app.command()
def show(
    name: str,
    base: KeyOption = None,
    variant: VariantOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """One concept: what the library knows, and what is in its file."""
    from sbora_diffusion.core.concept import read_concept

    console = Console(as_json)
    entry = _one(Library(library), name, base, variant)
    facts: dict[str, Any] = _document(entry)
    if not entry.path or not Path(entry.path).is_file():
        console.warn(f"the file of {name} is missing: {entry.path}")
    else:
        concept = read_concept(entry.path)
        if concept.meta.digest != entry.digest:
            console.warn(f"{entry.path} is not the file that the library noted")
        facts |= concept_facts(concept, Path(entry.path).stat().st_size)
    console.table(["concept", name], [[key, str(value)] for key, value in facts.items()])
    console.result(facts)


@library_app.command()
def add(
    file: Path,
    base: BaseOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register a concept file that was trained elsewhere, in the slot that it has."""
    from sbora_diffusion.core.concept import read_concept
    from sbora_diffusion.jobs import add_to_library

    console, concept = Console(as_json), read_concept(file)
    model = open_base(base or concept.meta.base_name or "pocket", "cpu")
    entry = add_to_library(file, concept, model, Library(library))
    console.say(f"{entry.name}: slot {entry.slot}, indices {entry.start} to {entry.stop - 1}")
    console.result(_document(entry))


@library_app.command()
def remove(
    name: str,
    base: KeyOption = None,
    variant: VariantOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a concept: its slot becomes free, its file stays."""
    console = Console(as_json)
    entry = Library(library).remove(name, base, variant)
    console.say(f"{name} is forgotten, slot {entry.slot} is free; its file stays: {entry.path}")
    console.result(_document(entry))


def inspect(
    file: Annotated[Path, typer.Argument(help="A concept file")], as_json: JsonOption = False
) -> None:
    """What a concept file is: variant, rank, indices, base, token, digest."""
    from sbora_diffusion.core.concept import read_concept

    console, concept = Console(as_json), read_concept(file)
    facts = concept_facts(concept, file.stat().st_size)
    console.table(["file", file.name], [[key, str(value)] for key, value in facts.items()])
    console.result({"file": str(file), **facts, "training": dict(concept.meta.training)})


def concept_facts(concept: "Concept", size: int) -> dict[str, Any]:
    """What a person wants to know about a concept file of `size` bytes."""
    meta = concept.meta
    factors = [stored.factor for stored in concept.layers.values()]
    embeddings = list(concept.embeddings.values())
    return {
        "name": meta.name,
        "class_noun": meta.class_noun,
        "token": " ".join(entry.token for entry in meta.tokens),
        "vectors": sum(len(vectors) for vectors in embeddings),
        "variant": meta.variant,
        "rank": meta.rank,
        "alpha": meta.alpha,
        "slot": meta.slot,
        "start": meta.start,
        "stop": meta.stop,
        "capacity": min(meta.widths.values()) // meta.rank,  # concepts of this rank
        "base": meta.base_name,
        "family": meta.family,
        "layers": len(concept.layers),
        "parameters": sum(tensor.numel() for tensor in [*factors, *embeddings]),
        "digest": meta.digest,
        "bytes": size,
    }


def _one(library: Library, name: str, base: str | None, variant: str | None) -> Entry:
    found = [
        entry
        for entry in library.concepts(base)
        if entry.name == name and variant in (None, entry.variant)
    ]
    if not found:
        raise ConfigError(
            f"library {library.path} has no concept {name!r}", "see `sbora library list`"
        )
    if len(found) > 1:
        places = ", ".join(f"{entry.base}/{entry.variant}" for entry in found)
        raise ConfigError(f"{name!r} is known for {places}", "say which with --base and --variant")
    return found[0]


def _row(entry: Entry) -> list[str]:
    indices = f"{entry.start}–{entry.stop - 1}"
    file = entry.path or "still in training"
    values = (entry.name, entry.token or "", entry.variant, entry.slot, indices, entry.base, file)
    return [str(value) for value in values]


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "token": entry.token,
        "variant": entry.variant,
        "slot": entry.slot,
        "start": entry.start,
        "stop": entry.stop,
        "base_key": entry.base,
        "path": entry.path,
        "digest": entry.digest,
    }
