"""What concepts own together: shares of the layers, and the price in plain words."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sbora_diffusion.core.layers import kind

COUNTED = {"fa": "columns", "fb": "rows"}


class Range(Protocol):
    """What a concept owns: the indices [start, stop) of each layer's permutation."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def rank(self) -> int: ...


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind and width, and how many of their columns or rows are owned.

    Attributes:
        layers: canonical names, sorted.
        owned: indices that some concept owns, the same number in each layer.
    """

    kind: str
    width: int
    layers: tuple[str, ...]
    owned: int

    @property
    def share(self) -> float:
        return self.owned / self.width


def layer_groups(widths: Mapping[str, int], ranges: Collection[Range]) -> list[LayerGroup]:
    """Layers by width and kind, the narrowest first.

    Args:
        widths: canonical name → width.
    """
    grouped: dict[tuple[int, str], list[str]] = {}
    for layer in sorted(widths):
        grouped.setdefault((widths[layer], kind(layer)), []).append(layer)
    return [
        LayerGroup(name, width, tuple(layers), owned(ranges, width))
        for (width, name), layers in sorted(grouped.items())
    ]


def owned(ranges: Collection[Range], width: int) -> int:
    """How many of the first `width` indices some range covers."""
    return len({index for r in ranges for index in range(r.start, min(r.stop, width))})


def room(ranges: Collection[Range], width: int, rank: int) -> int:
    """How many more ranges of a rank fit, each at a multiple of that rank."""
    taken = {index for r in ranges for index in range(r.start, r.stop)}
    starts = range(0, width - rank + 1, rank)
    return sum(taken.isdisjoint(range(start, start + rank)) for start in starts)


def price(variant: str, ranges: Sequence[Range], widths: Mapping[str, int]) -> str:
    """E.g. "14 concepts at rank 8 own 112 of 160 columns (70 %) of the narrowest layers; 6 more at
    rank 8 fit".

    Args:
        ranges: at least one.
        widths: canonical name → width; at least one.
    """
    width, ranks = min(widths.values()), sorted({r.rank for r in ranges})
    held, many = owned(ranges, width), len(ranges) > 1
    listed = " and ".join(filter(None, [", ".join(map(str, ranks[:-1])), str(ranks[-1])]))
    return (
        f"{len(ranges)} concept{'s' * many} at rank{'s' * (len(ranks) > 1)} {listed} "
        f"own{'s' * (not many)} {held} of {width} {COUNTED[variant]} ({held / width:.0%}) of the "
        f"narrowest layers; {room(ranges, width, ranks[-1])} more at rank {ranks[-1]} fit"
    ).replace("%)", " %)")
