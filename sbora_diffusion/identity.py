"""Is this the training that a checkpoint belongs to? What must agree, and what may be told."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import __version__, team
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, DataError, SboraError
from sbora_diffusion.core.storage import canonical_json
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig

ADJUSTABLE = frozenset(
    {
        "rate_tokens", "rate_text_encoder", "rate_unet", "max_gradient_norm", "batch_size",
        "gradient_accumulation", "gradient_checkpointing", "mixed_precision", "resolution",
    }
)  # fmt: skip
"""Settings that a training which ran out of memory or range is told to lower: it may go on with
others, but then not bit for bit."""


def identity(base: Base, subjects: Sequence[Subject], config: TrainConfig) -> dict[str, Any]:
    """What a training must agree in with the checkpoint that it goes on from, as JSON."""
    return {
        "base": base.key,
        "recipe": config.model_dump(mode="json"),
        "subject": {subject.settings.name: _subject(subject) for subject in subjects},
    }


def environment(base: Base) -> dict[str, Any]:
    """What decides rounding beside the recipe, as JSON."""
    device, on_gpu = base.device, base.device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    return {
        "threads": torch.get_num_threads(),
        "processes": team.size(),
        "device": f"{device.type} {gpu}".strip(),
        "dtype": str(base.denoiser.dtype).removeprefix("torch."),
        "compiled": base.runtime.compiled,
        "graphs": base.repeats,
        "deterministic": on_gpu and base.runtime.deterministic,
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "sbora_diffusion": __version__,
    }


def refuse_another(saved: Mapping[str, Any], here: Mapping[str, Any], place: Path) -> None:
    """Raise if a checkpoint belongs to another training.

    Args:
        saved, here: what `identity` gave then and gives now.
        place: where the checkpoints lie.

    Raises:
        BaseMismatch, ConfigError, DataError: another base, recipe or subject; names the first
            difference, what was found and what was expected, and counts the others.
    """
    found = [change for change in _changes(saved, here) if change[0] not in _MAY]
    if found:
        (key, then, now), more = found[0], len(found) - 1
        others = f" (and {more} more)" if more else ""
        raise _kind(key)(
            f"the checkpoint in {place} is another training's: its {key} is {then}, here it is "
            f"{now}{others}",
            "repeat the command as it was, or start anew without --resume",
        )


def departures(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs and does not hinder, but keeps the result from being the same bit for bit."""
    return [f"{key} was {then}, is {now}" for key, then, now in _changes(saved, here)]


_MAY = frozenset(f"recipe.{setting}" for setting in ADJUSTABLE)


def _changes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, then, now) of all leaves that differ."""
    then, now = dict(_leaves(saved)), dict(_leaves(here))
    keys = [*then, *(key for key in now if key not in then)]
    pairs = [(key, then.get(key, "none"), now.get(key, "none")) for key in keys]
    return [(key, one, other) for key, one, other in pairs if one != other]


def _leaves(document: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _kind(key: str) -> type[SboraError]:
    kinds = {"base": BaseMismatch, "subject": DataError}
    return kinds.get(key.partition(".")[0], ConfigError)


def _subject(subject: Subject) -> dict[str, Any]:
    """Its settings, and one digest of names, bytes and captions of its pictures."""
    pictures = hashlib.sha256()
    for image in subject.images:
        content = hashlib.sha256(image.read_bytes()).hexdigest()
        pictures.update(canonical_json([image.name, content, subject.caption(image)]).encode())
    settings = subject.settings.model_dump(mode="json", include={"class_noun", "token"})
    return {**settings, "pictures": pictures.hexdigest()[:16]}
