"""Concepts as a person names them: a file or a name in the library, with an optional weight."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from sbora_diffusion.core.concept import Concept, read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library


def load_concepts(
    specs: Sequence[str], library: Library | None = None
) -> list[tuple[Concept, float]]:
    """Read concepts given as `FILE[:WEIGHT]`, or as `NAME[:WEIGHT]` for one in the library.

    The weight is what follows the last colon, if that is a number.

    Raises:
        ConfigError: neither a file nor a known name, or the weight is not finite.
        FormatError, IntegrityError, NonFiniteError, ResourceError: see `read_concept`.
    """
    parsed = [_split_weight(spec) for spec in specs]
    return [(read_concept(_locate(place, library)), weight) for place, weight in parsed]


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
    """The file of that path or, if there is none, of that name in the library."""
    if Path(place).is_file():
        return Path(place)
    entries = library.concepts() if library else []
    found = [entry for entry in entries if entry.name == place]
    if len(found) > 1:
        places = ", ".join(f"{entry.base}/{entry.variant}" for entry in found)
        raise ConfigError(f"{place!r} is known for {places}", "give the file instead of the name")
    if not found:
        raise _unknown(place, sorted({entry.name for entry in entries}))
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
