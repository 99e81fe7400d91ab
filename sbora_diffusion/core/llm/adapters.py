"""Adapter folders on disk: read, held against each other, and written as an ordinary LoRA."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, FormatError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.functional import scaling
from sbora_diffusion.core.llm.training import RECORD
from sbora_diffusion.core.lora import lora_pair
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.core.updates import Update

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class TaskAdapter:
    """One trained adapter.

    Attributes:
        config: its PEFT configuration.
        record: what `sbora llm train` wrote beside it; empty for adapters of other programs.
        weight: λ, how much of it counts in a merge.
    """

    path: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    weight: float = 1.0

    @property
    def is_sbora(self) -> bool:
        return isinstance(self.config, SboraConfig)

    @property
    def rank(self) -> int:
        """The configuration's r; 0 for methods without one."""
        return int(getattr(self.config, "r", 0))

    @property
    def base(self) -> str:
        """The model that it was trained on, as its record or PEFT names it."""
        return str(self.record.get("base") or self.config.base_model_name_or_path or "")

    @property
    def training(self) -> Mapping[str, Any]:
        """Settings of its training."""
        return self.record.get("training", {})

    @cached_property
    def updates(self) -> dict[str, Update]:
        """SBoRA: module path → its columns or rows."""
        assert isinstance(self.config, SboraConfig) and self.config.alpha is not None
        scale = scaling(self.config.alpha, self.config.r, self.weight)
        found = {}
        for key, factor in self.tensors.items():
            layer, _, part = key.removeprefix(_PREFIX).rpartition(".")
            if part == "sbora_factor":
                indices = self.tensors[f"{_PREFIX}{layer}.sbora_indices"]
                found[layer] = Update(self.digest, self.config.variant, indices, factor, scale)
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights' file."""
        return hashlib.sha256((self.path / WEIGHTS).read_bytes()).hexdigest()


def read_adapter(path: Path, weight: float = 1.0) -> TaskAdapter:
    """Read an adapter folder.

    Raises:
        ConfigError: the folder holds no adapter.
        FormatError: it is damaged, or of a method that nobody here knows.
    """
    if not (path / WEIGHTS).is_file():
        raise ConfigError(f"{path} holds no adapter", "give what `sbora llm train` wrote")
    try:
        config = PeftConfig.from_pretrained(str(path))
        tensors = load_file(path / WEIGHTS)
        file = path / RECORD
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except Exception as error:  # three libraries, each with errors of its own
        reason = str(error).strip().partition("\n")[0][:200]
        raise FormatError(
            f"{path} cannot be read: {type(error).__name__}: {reason}", "train the adapter again"
        ) from error
    return TaskAdapter(path, config, tensors, record, weight)


def check_fits(adapter: TaskAdapter, model: nn.Module) -> None:
    """Refuse a SBoRA adapter whose layers a model does not have, or has in other sizes.

    Raises:
        BaseMismatch: names the first layer that does not fit.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for layer, update in adapter.updates.items():
        module = modules.get(layer)
        sizes = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
        kept, owned = 1 - update.dim, update.dim
        whole = update.factor.shape[kept] == sizes[kept] and max(update.owned) < sizes[owned]
        if not whole:
            raise BaseMismatch(
                f"{adapter.path} was trained on another model: {layer} does not fit",
                "give the base that it was trained on",
            )


def check_disjoint(adapters: Sequence[TaskAdapter]) -> None:
    """Refuse SBoRA adapters of one variant that own the same columns or rows of a layer.

    Raises:
        ConflictError: names the two, how much they share, and where.
    """
    for a, b in combinations(adapters, 2):
        shared = {
            layer: len(update.members & b.updates[layer].members)
            for layer, update in a.updates.items()
            if layer in b.updates and update.variant == b.updates[layer].variant
        }
        total = sum(shared.values())
        if total:
            first = next(layer for layer, count in shared.items() if count)
            raise ConflictError(
                f"{a.path} and {b.path} share {total} indices, first in {first}",
                "train one of them in another --slot, or give --allow-overlap",
            )


def export_lora(adapter: TaskAdapter, shapes: nn.Module, folder: Path) -> None:
    """Write a SBoRA adapter as an ordinary LoRA of PEFT, which needs nothing of this package.

    The one-hot factor is written out; alpha and rank stay, so that every value of ΔW does.

    Args:
        shapes: the base, with or without memory for its weights.

    Raises:
        ConfigError: the adapter is not SBoRA.
        BaseMismatch: the base has other layers.
        ConflictError: the folder exists and is not empty.
    """
    config = adapter.config
    if not isinstance(config, SboraConfig):
        raise ConfigError(
            f"{adapter.path} is a {config.peft_type} adapter, not SBoRA's", "it needs no export"
        )
    check_fits(adapter, shapes)
    tensors = {}
    for layer, update in adapter.updates.items():
        module: Any = shapes.get_submodule(layer)
        width = module.weight.shape[update.dim]
        pair = lora_pair(update.variant, update.indices, update.factor, width)
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = pair.up.contiguous()
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )

    def fill(place: Path) -> None:
        lora.save_pretrained(str(place))
        save_file(tensors, place / WEIGHTS, {"format": "pt"})

    write_folder(folder, fill)
