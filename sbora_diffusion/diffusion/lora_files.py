"""LoRAs in the files of other tools: kohya's, diffusers' and PEFT's, written and read."""

import math
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbora_diffusion.core.errors import FormatError, IntegrityError
from sbora_diffusion.core.lora import LoraLayer
from sbora_diffusion.core.schema import ConceptMeta
from sbora_diffusion.core.storage import encode, strict_json, write_atomically
from sbora_diffusion.diffusion.lora_names import SUFFIXES, canonical_name, kohya_name

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
FLATTENED = frozenset({"pocket", "sd1", "sd2", "sdxl"})
"""Families whose first text encoder is a CLIPTextModel, which lost its `text_model` in transformers
5.6; a CLIPTextModelWithProjection still has it."""
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_REMEDY = "give a LoRA with kohya's, diffusers' or PEFT's keys"

Layers = Mapping[str, LoraLayer]
"""Canonical name to LoRA."""


class LoraFile(NamedTuple):
    """What a LoRA file holds.

    Attributes:
        layers: canonical name, as far as one is known, to LoRA.
        metadata: the strings in the file's header.
    """

    layers: dict[str, LoraLayer]
    metadata: dict[str, str]


def kohya_tensors(layers: Layers, family: str) -> dict[str, Tensor]:
    """`lora_….lora_down.weight`, `….lora_up.weight` and `….alpha`, the true one, in fp32.

    Raises:
        ConfigError: kohya's format has no names for this family.
    """
    tensors = {}
    for layer, lora in layers.items():
        name = kohya_name(layer, family)
        tensors[f"{name}.lora_down.weight"] = lora.down
        tensors[f"{name}.lora_up.weight"] = lora.up
        tensors[f"{name}.alpha"] = torch.tensor(lora.alpha)
    return tensors


def diffusers_tensors(layers: Layers) -> dict[str, Tensor]:
    """`unet.….lora_A.weight` and `….lora_B.weight`, for a scale of 1.

    ComfyUI reads such keys too, but no metadata: an alpha would have to be a tensor, and diffusers
    refuses a file that has both. So there is none, and every reader scales by 1.
    """
    assert all(lora.scale == 1.0 for lora in layers.values())
    down = {f"{layer}.lora_A.weight": lora.down for layer, lora in layers.items()}
    return down | {f"{layer}.lora_B.weight": lora.up for layer, lora in layers.items()}


def encode_hashed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file that says the SHA-256 of what follows its header, by which A1111 knows a LoRA."""
    data = encode(tensors, {})
    payload = data[8 + int.from_bytes(data[:8], "little") :]
    return encode(tensors, {**metadata, "sshs_model_hash": sha256(payload).hexdigest()})


def write_peft(
    folder: Path, layers: Layers, metadata: Mapping[str, str], meta: ConceptMeta
) -> None:
    """One PEFT folder for each model of a pipeline: `unet/`, `text_encoder/` …

    Args:
        meta: of one of the concepts: its base and family.
    """
    base = meta.base_name if "/" in meta.base_name else None
    for component in sorted({layer.partition(".")[0] for layer in layers}):
        own = {
            _module_path(layer, meta.family): lora
            for layer, lora in layers.items()
            if layer.startswith(f"{component}.")
        }
        place = folder / component
        place.mkdir()
        _peft_config(own, base).save_pretrained(str(place))
        data = diffusers_tensors(
            {f"{PEFT_PREFIX}{path}": LoraLayer(x.down, x.up) for path, x in own.items()}
        )
        write_atomically(place / PEFT_WEIGHTS, encode(data, metadata))


def _module_path(layer: str, family: str) -> str:
    """The path of a layer inside its model."""
    component, _, path = layer.partition(".")
    flattened = component == "text_encoder" and family in FLATTENED
    return path.removeprefix("text_model.") if flattened else path


def _peft_config(own: Layers, base: str | None) -> LoraConfig:
    ((rank, alpha),) = {(lora.rank, lora.alpha) for lora in own.values()}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
        target_modules=sorted(own),
        base_model_name_or_path=base,
        inference_mode=True,
    )


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA: a `.safetensors` file, a PEFT folder, or a folder with either in it.

    Raises:
        FormatError: nothing of that kind is there, or it is another kind of adapter.
    """
    folders = peft_folders(path)
    if folders:
        parts = [_read_peft(folder) for folder in folders]
        layers = {layer: lora for part in parts for layer, lora in part.layers.items()}
        return LoraFile(layers, parts[0].metadata)
    tensors, metadata = load_tensors(_only_file(path))
    configs = _by_component(metadata.get(_DIFFUSERS_METADATA, "{}"))
    return LoraFile(_layers(tensors, str(path), configs), metadata)


def peft_folders(path: Path) -> list[Path]:
    """The PEFT folders that a path is or holds."""
    if not path.is_dir():
        return []
    return [f for f in (path, *sorted(path.iterdir())) if (f / PEFT_CONFIG).is_file()]


def read_peft_config(folder: Path) -> PeftConfig:
    """The configuration in a PEFT folder.

    Raises:
        FormatError: it is none that PEFT knows.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise FormatError(
            f"{folder / PEFT_CONFIG} is no configuration of PEFT: {str(error).splitlines()[0]}",
            _REMEDY,
        ) from error


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any `.safetensors` file, on the CPU.

    Raises:
        FormatError: it is none.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is not a safetensors file: {error}", _REMEDY) from error


def refuse_difference(written: Layers, path: Path) -> None:
    """Read a LoRA back, since a reader that knows none of its keys loads nothing and says nothing.

    Raises:
        IntegrityError: it does not hold these layers, bit for bit.
    """
    found = read_lora(path).layers
    wrong = [layer for layer in written if not _same(written[layer], found.get(layer))]
    if wrong or found.keys() != written.keys():
        raise IntegrityError(
            f"{len(wrong)} of {len(written)} layers read back differently, first {wrong[:1]}",
            "check the disk and export again",
        )


def _same(one: LoraLayer, other: LoraLayer | None) -> bool:
    return (
        other is not None
        and torch.equal(one.down, other.down)
        and torch.equal(one.up, other.up)
        and math.isclose(one.scale, other.scale, rel_tol=1e-6)
    )


def _only_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FormatError(f"{path} holds {len(files)} .safetensors files", "name one of them")
    return files[0]


def _read_peft(folder: Path) -> LoraFile:
    config = read_peft_config(folder)
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise FormatError(f"{folder} is no plain LoRA, but {config.peft_type}", _REMEDY)
    tensors, metadata = load_tensors(folder / PEFT_WEIGHTS)
    paths = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    component = _component(folder.name, paths)
    named = {f"{component}.{path}": value for path, value in paths.items()}
    return LoraFile(_layers(named, str(folder), {component: vars(config)}), metadata)


def _component(name: str, paths: Iterable[str]) -> str:
    """The model that a PEFT folder is for: by its name, else by what it adapts."""
    if name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        return name
    inside = " ".join(paths)
    if "self_attn" in inside:
        return "text_encoder"
    return "unet" if "_blocks." in inside and "mid_block" in inside else "transformer"


def _by_component(text: str) -> dict[str, dict[str, Any]]:
    """diffusers' metadata, JSON with `unet.r` and so on, → component → configuration."""
    try:
        said = dict(strict_json(text))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{_DIFFUSERS_METADATA} is no JSON object: {error}", _REMEDY) from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


def _layers(
    tensors: Mapping[str, Tensor], place: str, configs: Mapping[str, dict[str, Any]]
) -> dict[str, LoraLayer]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, part = _split(key, place)
        parts.setdefault(name, {})[part] = value
    incomplete = sorted(name for name, own in parts.items() if {"down", "up"} - own.keys())
    if incomplete or not parts:
        raise FormatError(
            f"{place} has {len(incomplete)} of {len(parts)} layers without both factors, first "
            f"{incomplete[:1]}",
            _REMEDY,
        )
    for name, own in parts.items():
        _refuse_misfits(name, own)
    return {
        canonical_name(name): LoraLayer(own["down"], own["up"], _scale(name, own, configs))
        for name, own in parts.items()
    }


def _refuse_misfits(name: str, own: Mapping[str, Tensor]) -> None:
    down, up, alpha = own["down"], own["up"], own.get("alpha")
    numbers = down.is_floating_point() and up.is_floating_point()
    fitting = min(down.dim(), up.dim()) >= 2 and down.shape[0] == up.shape[1] > 0
    if not (numbers and fitting) or (alpha is not None and alpha.numel() != 1):
        raise FormatError(
            f"the factors of {name[:200]!r} do not fit together: {tuple(down.shape)} and "
            f"{tuple(up.shape)}",
            _REMEDY,
        )


def _split(key: str, place: str) -> tuple[str, str]:
    for suffix, part in SUFFIXES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), part
    raise FormatError(f"{place} is no plain LoRA: it has a tensor {key[:200]!r}", _REMEDY)


def _scale(name: str, own: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> float:
    """alpha / rank; 1 where nothing says alpha, as every reader takes it."""
    rank = own["down"].shape[0]
    if "alpha" in own:
        return own["alpha"].item() / rank
    component, _, path = name.partition(".")
    config = configs.get(component, {})
    try:
        alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
        usual: float = config.get("lora_alpha", rank)
        alpha = alphas.get(get_pattern_key(list(alphas), path), usual)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, AttributeError, re.error) as error:
        raise FormatError(f"alpha of {name[:200]!r} is no number: {error}", _REMEDY) from error
