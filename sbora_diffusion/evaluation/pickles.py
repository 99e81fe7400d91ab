"""Libraries that would unpickle weights where they find no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

from sbora_diffusion.core.errors import FormatError


@contextmanager
def no_pickles() -> Iterator[None]:
    """PyTorch's own loaders raise a FormatError while this lasts, whoever calls them."""
    with patch("torch.load", _refuse), patch("torch.jit.load", _refuse):
        yield


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise FormatError(
        "there are only weights of a PyTorch checkpoint, which could run code and is never opened",
        "give a model that is published as .safetensors",
    )
