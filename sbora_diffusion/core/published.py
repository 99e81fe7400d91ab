"""Checkpoints of the published SBoRA code (github.com/cityuhkai/SBoRA), for this package's tuner.

They hold, in `adapter_model.bin`, the indices as int64 (r,) under ``<module>.lora_A`` (FA) or
``<module>.lora_B`` (FB), without ``.weight``, and the trained factor beside them. The indices were
drawn at random, so they are no range of an allocation: they become an adapter of the PEFT tuner,
not a concept. The quantized models' configuration calls itself a LoRA; the tensors say what it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.core.storage import encode, write_atomically
from sbora_diffusion.core.tuner import SboraConfig

WEIGHTS, CONFIG = "adapter_model.bin", "adapter_config.json"
_REMEDY = "give a folder that the published code's save_pretrained wrote"


def is_published(folder: Path) -> bool:
    """Does it look like one? It is not opened."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def import_published(source: Path, folder: Path) -> int:
    """Write a PEFT folder with the same update, which `PeftModel.from_pretrained` loads once
    `sbora_diffusion` is imported.

    Returns:
        The number of adapted layers.

    Raises:
        FormatError: it is no such checkpoint, or a tensor does not fit.
        ConflictError: the folder exists and is not empty.
        ResourceError: the folder cannot be written.
    """
    said = _read_config(source / CONFIG)
    found, rank = _read_weights(source / WEIGHTS), said["r"]
    variant: Variant = "fa" if any(key.endswith(".lora_A") for key in found) else "fb"
    tensors = _renamed(found, variant, rank)
    config = SboraConfig(
        r=rank,
        alpha=said["lora_alpha"],
        variant=variant,
        target_modules=said["target_modules"],
        task_type=said.get("task_type"),
        base_model_name_or_path=said.get("base_model_name_or_path"),
        inference_mode=True,
    )

    def fill(unfinished: Path) -> None:
        config.save_pretrained(str(unfinished))
        data = encode(tensors, {"format": "pt"})
        write_atomically(unfinished / "adapter_model.safetensors", data)

    write_folder(folder, fill)
    return len(tensors) // 2


def _read_config(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        known = said["peft_type"] in ("SBORA", "LORA")
        numbers = type(said["r"]) is int and said["r"] > 0 and said["lora_alpha"] > 0
        modules = isinstance(said["target_modules"], list | str)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is no configuration of SBoRA: {error!r}", _REMEDY) from error
    if not (known and numbers and modules) or said.get("fan_in_fan_out"):
        raise FormatError(f"{file} is no configuration of SBoRA on linear layers", _REMEDY)
    return said


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a damaged one lead to
        raise FormatError(
            f"{file} holds more than tensors, or is damaged: {error!r:.100}", _REMEDY
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FormatError(f"{file} is no table of tensors", _REMEDY)
    return found


def _renamed(found: Mapping[str, Tensor], variant: Variant, rank: int) -> dict[str, Tensor]:
    """The tuner's names, `<module>.sbora_indices` and `….sbora_factor`, for the published ones."""
    fixed, trained = ("lora_A", "lora_B") if variant == "fa" else ("lora_B", "lora_A")
    modules = sorted(key.removesuffix(f".{fixed}") for key in found if key.endswith(f".{fixed}"))
    expected = {f"{m}.{end}" for m in modules for end in (fixed, f"{trained}.weight")}
    if not modules or expected != found.keys():
        differing = sorted(expected ^ found.keys())
        raise FormatError(
            f"{len(differing)} tensors are missing or unknown, first {differing[:1]}", _REMEDY
        )
    tensors = {}
    for module in modules:
        indices, factor = found[f"{module}.{fixed}"], found[f"{module}.{trained}.weight"]
        _refuse_misfits(module, indices, factor, rank, 1 if variant == "fa" else 0)
        tensors[f"{module}.sbora_indices"] = indices.to(torch.int32)
        tensors[f"{module}.sbora_factor"] = factor.float()
    return tensors


def _refuse_misfits(module: str, indices: Tensor, factor: Tensor, rank: int, side: int) -> None:
    whole = indices.dtype == torch.int64 and indices.shape == (rank,)
    if not whole or indices.min() < 0 or indices.unique().numel() != rank:
        raise FormatError(f"{module} has no {rank} distinct indices", _REMEDY)
    if factor.dim() != 2 or factor.shape[side] != rank or not factor.is_floating_point():
        raise FormatError(
            f"the factor of {module} has shape {tuple(factor.shape)}, not rank {rank}", _REMEDY
        )
    if not factor.isfinite().all():
        raise FormatError(f"the factor of {module} has NaN or infinite values", _REMEDY)
