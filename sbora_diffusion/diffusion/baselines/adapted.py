"""A trained concept of a method other than SBoRA: parts of each layer's update, and its file.

One `.safetensors` a concept: `<canonical layer>.<part>` for every part and `token` for the
placeholder's vectors, and under a metadata key that names the method a JSON document.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from torch import Tensor

from sbora_diffusion.core.concept import canonical_document
from sbora_diffusion.core.errors import FormatError, NonFiniteError
from sbora_diffusion.core.schema import LAYER_NAME, NAME_PATTERN, TOKEN_PATTERN, Text
from sbora_diffusion.core.storage import canonical_json, decode, encode, write_atomically

Form = Literal["words", "low-rank", "magnitude", "full"]
PARTS: dict[Form, frozenset[str]] = {
    "words": frozenset(),
    "low-rank": frozenset({"down", "up"}),
    "magnitude": frozenset({"down", "up", "magnitude"}),
    "full": frozenset({"delta"}),
}
"""What each adapted layer has: down (r, in), up (out, r), magnitude (out,), delta (out, in)."""
TOKEN = "token"
KEY = "sbora-baseline-"
"""Before the method's name, in the file's metadata."""
_REMEDY = "give a file that this method wrote"

Parts = Mapping[str, Tensor]


class AdaptedMeta(BaseModel):
    """The JSON document of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    method: Text
    form: Form
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    class_noun: Text
    token: Annotated[str, StringConstraints(pattern=TOKEN_PATTERN)]
    base_key: Text
    training: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Adapted:
    """A trained concept, on the CPU.

    Attributes:
        layers: canonical name of the layer → its parts, see `PARTS`.
        vectors: (vectors, dim) of the placeholder, or (vectors, layers, dim) with one for each
            cross-attention layer; (0, dim) where there is none.
    """

    meta: AdaptedMeta
    layers: Mapping[str, Parts]
    vectors: Tensor


def update_of(parts: Parts, own: Tensor) -> Tensor:
    """ΔW, (out, in), fp32 on the device of `own`.

    Args:
        own: (out, in), the base's weight W0, which a magnitude refers to: DoRA's weight is
            m (W0 + B A) / ‖W0 + B A‖, row by row (Liu et al. 2024, arXiv 2402.09353, Equation 5).
    """
    there = {part: tensor.to(own.device, torch.float32) for part, tensor in parts.items()}
    if "delta" in there:
        return there["delta"]
    product = there["up"] @ there["down"]
    if "magnitude" not in there:
        return product
    weight = own.float() + product
    return weight * (there["magnitude"] / weight.norm(dim=1))[:, None] - own.float()


def write_adapted(path: Path, concept: Adapted) -> None:
    """Write the file atomically; the same concept gives the same bytes.

    Raises:
        ResourceError: it cannot be written.
    """
    tensors = {
        f"{layer}.{part}": tensor
        for layer, parts in concept.layers.items()
        for part, tensor in parts.items()
    }
    if len(concept.vectors):
        tensors[TOKEN] = concept.vectors
    document = canonical_json(concept.meta.model_dump(mode="json"))
    write_atomically(path, encode(tensors, {KEY + concept.meta.method: document}))


def read_adapted(path: Path, method: str) -> Adapted:
    """Read what `write_adapted` wrote for this method, and validate all of it.

    Raises:
        FormatError: it is another file, or its tensors do not fit together.
        NonFiniteError: a tensor has NaN or infinite values.
        ResourceError: it cannot be opened.
    """
    tensors, metadata = decode(path)
    if list(metadata) != [KEY + method]:
        found = [key.removeprefix(KEY) for key in metadata if key.startswith(KEY)]
        raise FormatError(
            f"{path} is a file of {found or 'something else'}, not of {method!r}", _REMEDY
        )
    meta = _meta(path, metadata[KEY + method])
    if meta.method != method:
        raise FormatError(f"{path} says that it is of {meta.method!r}, not of {method!r}", _REMEDY)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{path}: {name[:200]} is not finite", "train the concept again")
    vectors = tensors.pop(TOKEN, torch.zeros(0, 1))
    if vectors.dim() not in (2, 3):
        raise FormatError(f"{path}: {TOKEN} has the shape {list(vectors.shape)}", _REMEDY)
    return Adapted(meta, _grouped(tensors, meta.form, path), vectors)


def _meta(path: Path, text: str) -> AdaptedMeta:
    try:
        return AdaptedMeta.model_validate(canonical_document(text))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FormatError(f"{path}: {field[:200]}: {first['msg']}", _REMEDY) from error


def _grouped(tensors: Mapping[str, Tensor], form: Form, path: Path) -> dict[str, Parts]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        if not LAYER_NAME.fullmatch(layer) or parts.keys() != PARTS[form] or not _fit(parts):
            shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
            raise FormatError(f"{path}: {layer[:200]!r} has the parts {shapes}", _REMEDY)
    if bool(layers) != bool(PARTS[form]):
        raise FormatError(f"{path} has {len(layers)} layers, but is {form!r}", _REMEDY)
    return dict(layers)


def _fit(parts: Parts) -> bool:
    if "delta" in parts:
        return parts["delta"].dim() == 2
    down, up = parts["down"], parts["up"]
    square = down.dim() == up.dim() == 2 and len(down) == up.shape[1]
    return square and ("magnitude" not in parts or parts["magnitude"].shape == up.shape[:1])
