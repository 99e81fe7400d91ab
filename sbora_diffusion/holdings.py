"""What a library's concepts own of one base, as lines, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbora_diffusion.core.errors import SboraError
from sbora_diffusion.library import Entry, Library
from sbora_diffusion.ownership import COUNTED, LayerGroup, layer_groups, price

if TYPE_CHECKING:
    from PIL.Image import Image

    from sbora_diffusion.plots import Section, Strips


@dataclass(frozen=True)
class Holding:
    """The concepts of one base and variant, by their ranges.

    Attributes:
        widths: canonical layer name → width; empty if only an older version noted the concepts.
    """

    base: str
    variant: str
    entries: tuple[Entry, ...]
    widths: Mapping[str, int]

    @property
    def groups(self) -> list[LayerGroup]:
        return layer_groups(self.widths, self.entries)

    @property
    def price(self) -> str:
        if not self.widths:
            return "the widths of the layers are not known; `sbora library add FILE` notes them"
        return price(self.variant, self.entries, self.widths)

    def document(self) -> dict[str, Any]:
        """For JSON; `groups` has the narrowest layers first."""
        return {
            "base_key": self.base,
            "variant": self.variant,
            "price": self.price,
            "groups": [
                {
                    "kind": group.kind,
                    "layers": len(group.layers),
                    "width": group.width,
                    "owned": group.owned,
                    "share": round(group.share, 4),
                }
                for group in self.groups
            ],
        }

    def rows(self) -> list[list[str]]:
        """Layers, width, owned, share: for a table."""
        return [
            [
                f"{len(group.layers)} × {group.kind}",
                str(group.width),
                f"{group.owned} {COUNTED[self.variant]}",
                f"{100 * group.share:.0f} %",
            ]
            for group in self.groups
        ]


def holdings(library: Library) -> list[Holding]:
    """Every base and variant that the library has concepts of, in its order."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in library.concepts():
        found.setdefault((entry.base, entry.variant), []).append(entry)
    return [Holding(*key, tuple(of), library.layers(*key)) for key, of in found.items()]


def picture(found: Sequence[Holding], highlight: str | None = None) -> "Image":
    """Who owns what: a strip in the order of allocation and a line for each layer.

    The lines show the indices that stand in the concept files; a file that is missing or damaged
    leaves its concept out of them.
    """
    from sbora_diffusion.plots import ownership_picture

    return ownership_picture([_section(holding) for holding in found], highlight)


def _section(holding: Holding) -> "Section":
    from sbora_diffusion.plots import Section

    indices = {entry.name: _indices(entry) for entry in holding.entries}
    legend = {e.name: f"{e.name}  {e.start} to {e.stop - 1}" for e in holding.entries}
    counted = COUNTED[holding.variant]
    title = f"SBoRA-{holding.variant.upper()}: who owns which {counted}"
    strips = [_strips(holding, group, indices) for group in holding.groups]
    return Section(f"{title} of {holding.base}", holding.price, strips, legend)


def _strips(
    holding: Holding, group: LayerGroup, indices: Mapping[str, Mapping[str, list[int]]]
) -> "Strips":
    from sbora_diffusion.plots import Strips

    title = (
        f"{len(group.layers)} {group.kind} layers, {group.width} {COUNTED[holding.variant]}: as "
        "handed out, and below as they lie in each layer"
    )
    layers = [
        {name: owned[layer] for name, owned in indices.items() if layer in owned}
        for layer in group.layers
    ]
    ranges = {entry.name: (entry.start, entry.stop) for entry in holding.entries}
    return Strips(title, group.width, ranges, layers)


def _indices(entry: Entry) -> dict[str, list[int]]:
    from sbora_diffusion.core.concept_set import read_member

    if not entry.path or not Path(entry.path).is_file():
        return {}
    try:
        concept = read_member(entry.path, entry.name)
    except SboraError:
        return {}
    return {layer: stored.indices.tolist() for layer, stored in concept.layers.items()}
