"""The commands that look at concept files and at the library."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import BaseOption, Console, JsonOption, LibraryOption, open_base
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.holdings import Holding, holdings, picture
from sbora_diffusion.library import Entry, Library

if TYPE_CHECKING:
    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.core.concept_set import ConceptSet

library_app = typer.Typer(rich_markup_mode=None)

KeyOption = Annotated[
    str | None, typer.Option("--base", help="Key of the base, as `sbora library list` shows it")
]
VariantOption = Annotated[str | None, typer.Option(help="fa or fb")]
HOLDING_COLUMNS = ["layers", "width", "owned", "share"]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw who owns what")
]


@library_app.command("list")
def list_concepts(
    plot: PlotOption = None, library: LibraryOption = None, as_json: JsonOption = False
) -> None:
    """All known concepts, by base, variant and indices, and what they own together."""
    console, shelf = Console(as_json), Library(library)
    found = holdings(shelf)
    if plot:
        _check_plot(plot, found)
    entries = [entry for holding in found for entry in holding.entries]
    if not entries:
        console.say(f"no concepts in {shelf.path} yet; `sbora train FOLDER` adds one")
    else:
        columns = ["name", "token", "variant", "slot", "indices", "base", "file"]
        console.table(columns, [_row(entry) for entry in entries])
    for holding in found:
        _say_holding(console, holding)
    if plot:
        _draw(console, plot, found)
    console.result(
        {
            "library": str(shelf.path),
            "concepts": [_document(entry) for entry in entries],
            "capacity": [holding.document() for holding in found],
        }
    )


@library_app.command()
def show(
    name: str,
    plot: PlotOption = None,
    base: KeyOption = None,
    variant: VariantOption = None,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """One concept: what the library knows, what is in its file, and its share of the layers."""
    console, shelf = Console(as_json), Library(library)
    entry = _one(shelf, name, base, variant)
    together = next(holding for holding in holdings(shelf) if entry in holding.entries)
    if plot:
        _check_plot(plot, [together])
    facts: dict[str, Any] = _document(entry)
    if not entry.path or not Path(entry.path).is_file():
        console.warn(f"the file of {name} is missing: {entry.path}")
    else:
        facts |= _facts_of_file(console, entry)
    console.table(["concept", name], [[key, str(value)] for key, value in facts.items()])
    alone = replace(together, entries=(entry,))
    console.say(f"\n{name}'s own share")
    console.table(HOLDING_COLUMNS, alone.rows())
    console.say(f"\nwith its neighbours: {together.price}")
    if plot:
        _draw(console, plot, [together], highlight=name)
    console.result({**facts, "shares": alone.document()["groups"]})


@library_app.command()
def add(
    file: Path,
    base: BaseOption = None,
    allow_overlap: Annotated[
        bool, typer.Option(help="Beside the owner of its slot: no prompt may call both")
    ] = False,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register concepts that were trained elsewhere, in their slots: of a file or of a set."""
    from sbora_diffusion.core.concept_set import read_concepts
    from sbora_diffusion.jobs import add_to_library

    console, concepts = Console(as_json), [c for c, _ in read_concepts(file).concepts]
    named = next((c.meta.base_name for c in concepts if c.meta.base_name), "pocket")
    model, shelf = open_base(base or named, "cpu"), Library(library)
    entries = add_to_library(file, concepts, model, shelf, allow_overlap)
    for entry in entries:
        console.say(f"{entry.name}: slot {entry.slot}, indices {entry.start} to {entry.stop - 1}")
    found = [_document(entry) for entry in entries]
    console.result(found[0] if len(found) == 1 else {"concepts": found})


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
    """What a concept file or a concept set is: variant, rank, indices, base, token, digest."""
    from sbora_diffusion.core.concept_set import read_concepts

    console, found = Console(as_json), read_concepts(file)
    if found.digest:
        _inspect_set(console, file, found)
        return
    ((concept, _),) = found.concepts
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


def _inspect_set(console: Console, file: Path, found: "ConceptSet") -> None:
    metas = [(concept.meta, weight) for concept, weight in found.concepts]
    overlap = "may share indices" if found.allow_overlap else "share no indices"
    console.say(f"{file.name}: a set of {len(metas)} concepts, those of one variant {overlap}")
    rows = [
        [m.name, f"{w:g}", " ".join(t.token for t in m.tokens), m.variant, str(m.rank),
         f"{m.start}–{m.stop - 1}", m.base_name, m.digest[:16]]
        for m, w in metas
    ]  # fmt: skip
    console.table(["name", "weight", "token", "variant", "rank", "indices", "base", "digest"], rows)
    size = file.stat().st_size
    facts = [{**concept_facts(concept, size), "weight": w} for concept, w in found.concepts]
    console.result(
        {
            "file": str(file),
            "digest": found.digest,
            "allow_overlap": found.allow_overlap,
            "bytes": size,
            "concepts": [{k: v for k, v in one.items() if k != "bytes"} for one in facts],
        }
    )


def _say_holding(console: Console, holding: Holding) -> None:
    console.say(f"\nSBoRA-{holding.variant.upper()} on {holding.base}: {holding.price}")
    if holding.widths:
        console.table(HOLDING_COLUMNS, holding.rows())


def _check_plot(file: Path, found: list[Holding]) -> None:
    """A picture that cannot be drawn is refused before anything is printed."""
    from sbora_diffusion.outputs import check_picture_output

    check_picture_output(file)
    if not found:
        raise ConfigError("there is nothing to draw: the library is empty", "train a concept first")


def _draw(console: Console, file: Path, found: list[Holding], highlight: str | None = None) -> None:
    from sbora_diffusion.pictures import save_png

    save_png(picture(found, highlight), file, {})
    console.say(str(file))


def _facts_of_file(console: Console, entry: Entry) -> dict[str, Any]:
    from sbora_diffusion.core.concept_set import read_member

    assert entry.path
    concept = read_member(entry.path, entry.name)
    if concept.meta.digest != entry.digest:
        console.warn(f"{entry.path} is not the file that the library noted")
    return concept_facts(concept, Path(entry.path).stat().st_size)


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
