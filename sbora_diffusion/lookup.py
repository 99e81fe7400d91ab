"""Concepts as a person names them: a file or a name in the library, with an optional weight."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.concept_set import ConceptSet, read_concepts, read_member
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import EXAMPLES, Library


def load_concepts(
    specs: Sequence[str], library: Library | None = None
) -> list[tuple[Concept, float]]:
    """Read concepts given as `FILE[:WEIGHT]`, or as `NAME[:WEIGHT]` for one in the library or, if
    none there has that name, one of the examples.

    The weight is what follows the last colon, if that is a number. A concept set stands for all its
    concepts, each with its own weight times the given one.

    Raises:
        ConfigError: neither a file nor a known name, or the weight is not finite.
        FormatError, IntegrityError, NonFiniteError, ResourceError: see `read_concepts`.
    """
    return list(load_selection(specs, library).concepts)


def load_selection(specs: Sequence[str], library: Library | None = None) -> ConceptSet:
    """As `load_concepts`; a concept set on its own keeps its permission to overlap."""
    sets = [_load(spec, library) for spec in specs]
    concepts = tuple(pair for found in sets for pair in found.concepts)
    return ConceptSet(concepts, len(sets) == 1 and sets[0].allow_overlap)


def _load(spec: str, library: Library | None) -> ConceptSet:
    place, weight = _split_weight(spec)
    file = _locate(place, library)
    if not Path(place).is_file():  # a name stands for one concept, whatever else its file holds
        return ConceptSet(((read_member(file, place), weight),))
    found = read_concepts(file)
    scaled = tuple((concept, own * weight) for concept, own in found.concepts)
    return ConceptSet(scaled, found.allow_overlap)


def _split_weight(spec: str) -> tuple[str, float]:
    place, colon, text = spec.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0
    if not colon or not place:
        return spec, 1.0
    if not math.isfinite(weight):
        raise ConfigError(f"the weight in {spec!r} must be a finite number", "e.g. FILE:0.8")
    return place, weight


def _locate(place: str, library: Library | None) -> Path:
    """The file of that path or, if there is none, of that name in the library, or an example."""
    if Path(place).is_file():
        return Path(place)
    entries = library.concepts() if library else []
    found = [entry for entry in entries if entry.name == place]
    if len(found) > 1:
        places = ", ".join(f"{entry.base}/{entry.variant}" for entry in found)
        raise ConfigError(f"{place!r} is known for {places}", "give the file instead of the name")
    if not found:
        examples = {file.stem: file for file in EXAMPLES.glob("*.safetensors")}
        if place in examples:
            return examples[place]
        raise _unknown(place, sorted({entry.name for entry in entries} | set(examples)))
    if found[0].path is None or not Path(found[0].path).is_file():
        raise ConfigError(
            f"the file of {place!r}, {found[0].path}, is missing", "train it again or give a file"
        )
    return Path(found[0].path)


def _unknown(place: str, names: list[str]) -> ConfigError:
    close = difflib.get_close_matches(place, names, n=1, cutoff=0.5)
    file, colon, _ = place.rpartition(":")
    if colon and Path(file).is_file():
        return ConfigError(f"the weight in {place!r} is not a number", f"e.g. {file}:0.8")
    return ConfigError(
        f"{place!r} is neither a concept file nor the name of one in the library",
        f"did you mean {close[0]!r}?" if close else "see `sbora library list`",
    )
