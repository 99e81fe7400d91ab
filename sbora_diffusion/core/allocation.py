"""Disjoint indices: (layer name, width, range of slots) to the indices a concept owns.

For a layer of width n a permutation of 0..n-1 is drawn from a stable hash of the allocation seed
and the layer's canonical name; a concept owns a range of that permutation. Two concepts whose
ranges do not meet therefore share no index in any layer, whoever trained them and wherever.

The permutation, exactly:

1. The byte string ``b"sbora-allocation-1\\0"`` + allocation seed (8 bytes, little-endian) + the
   canonical layer name in ASCII + ``b"\\0"`` + block counter (8 bytes, little-endian, from 0) is
   hashed with SHA-256.
2. Each 32-byte digest gives four unsigned 64-bit words, read little-endian, in order.
3. A number below m is the first word w with ``w < m * floor(2**64 / m)``, taken modulo m
   (rejection sampling, so that every number is equally likely); rejected words are skipped.
4. Fisher-Yates on the list 0..n-1: for i = n-1, n-2, ..., 1 swap the entries i and j, where j is
   the next number below i + 1.

The width is not hashed: names are unique within a base, so it would add nothing.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch

from sbora_diffusion.core.errors import CapacityError, ConfigError
from sbora_diffusion.core.layers import narrowest

MAX_WIDTH = 1 << 17
"""Widest layer accepted; bounds the time a hostile file can cost its reader."""

_DOMAIN = b"sbora-allocation-1\0"
_WORDS = struct.Struct("<4Q")


def permutation(layer: str, width: int, seed: int) -> tuple[int, ...]:
    """The permutation of 0..width-1 that the module's docstring defines.

    Args:
        layer: canonical layer name, e.g. ``"unet.mid_block.attentions.0...attn2.to_k"``.
        width: number of columns (FA: inputs) or rows (FB: outputs) of the layer.
        seed: allocation seed, 0 to 2**64 - 1.

    Raises:
        ConfigError: the name is empty, not ASCII or has a NUL, or width or seed is out of range.
    """
    return tuple(_shuffled(layer, width, seed).tolist())


def indices_for(layer: str, width: int, start: int, stop: int, seed: int) -> torch.Tensor:
    """The indices that the range [start, stop) owns in one layer.

    Returns:
        int32, shape (stop - start,), ascending.

    Raises:
        CapacityError: the range ends beyond the layer's width.
        ConfigError: the range is empty or negative, or `permutation` refuses the rest.
    """
    _check_range(start, stop)
    shuffled = _shuffled(layer, width, seed)
    check_capacity({layer: width}, start, stop)
    return shuffled[start:stop].sort().values


def slot_range(slot: int, rank: int) -> tuple[int, int]:
    """The range [slot * rank, (slot + 1) * rank) that a slot of a rank stands for.

    Raises:
        ConfigError: slot is negative or rank is below 1.
    """
    _check_rank(rank)
    if slot < 0:
        raise ConfigError(f"slot must be 0 or more, got {slot}", "slots count from 0")
    return slot * rank, (slot + 1) * rank


def capacity(widths: Mapping[str, int], rank: int) -> int:
    """How many concepts of one rank fit beside each other: set by the narrowest layer.

    Args:
        widths: canonical layer name to width.

    Raises:
        ConfigError: no layers are given, or rank is below 1.
    """
    _check_rank(rank)
    return widths[narrowest(widths)] // rank


def check_capacity(widths: Mapping[str, int], start: int, stop: int) -> None:
    """Refuse a range that does not fit into every layer.

    Raises:
        CapacityError: names the binding layer, its width, the rank and how many concepts fit.
        ConfigError: no layers are given, or the range is empty or negative.
    """
    _check_range(start, stop)
    layer = narrowest(widths)
    if stop > widths[layer]:
        raise CapacityError(
            f"indices {start} to {stop - 1} (rank {stop - start}) do not fit into {layer!r}, which "
            f"is {widths[layer]} wide and holds {widths[layer] // (stop - start)} concepts of that "
            "rank",
            "choose a lower slot or a lower rank, or remove a concept from the library",
        )


@lru_cache(maxsize=2048)
def _shuffled(layer: str, width: int, seed: int) -> torch.Tensor:
    """`permutation` as an int32 tensor, 4 bytes an entry; callers must not write to it."""
    _check_layer(layer, width, seed)
    words = _words(layer, seed)
    order = list(range(width))
    for i in range(width - 1, 0, -1):
        j = _below(i + 1, words)
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, dtype=torch.int32)


def _words(layer: str, seed: int) -> Iterator[int]:
    prefix = hashlib.sha256(_DOMAIN + seed.to_bytes(8, "little") + layer.encode("ascii") + b"\0")
    counter = 0
    while True:
        block = prefix.copy()
        block.update(counter.to_bytes(8, "little"))
        yield from _WORDS.unpack(block.digest())
        counter += 1


def _below(bound: int, words: Iterator[int]) -> int:
    limit = (1 << 64) // bound * bound
    return next(word for word in words if word < limit) % bound


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"rank must be 1 or more, got {rank}", "choose e.g. rank 8")


def _check_range(start: int, stop: int) -> None:
    if not 0 <= start < stop:
        raise ConfigError(
            f"a range of indices must satisfy 0 <= start < stop, got {start} and {stop}",
            "use the range of a slot: start = slot * rank, stop = start + rank",
        )


def _check_layer(layer: str, width: int, seed: int) -> None:
    if not layer or not layer.isascii() or "\0" in layer:
        raise ConfigError(f"{layer!r} is no layer name", "give the canonical module path")
    if not 1 <= width <= MAX_WIDTH:
        raise ConfigError(
            f"layer {layer!r} is {width} wide, must be 1 to {MAX_WIDTH}",
            "leave this layer out of the targets",
        )
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"allocation seed must be 0 to 2**64 - 1, got {seed}", "use e.g. 0")
