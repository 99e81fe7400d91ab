"""The form of the tab Train, made from the configuration's schema, and the job that it gives."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sbora_diffusion.app.job_store import Job, JobStore
from sbora_diffusion.app.subjects import find_subjects, first_picture
from sbora_diffusion.app.workspace import Workspace
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.settings import validate
from sbora_diffusion.diffusion.config import TrainConfig

PRESETS: Mapping[str, dict[str, Any]] = {
    "Quick look (100 steps)": {"steps": 100},
    "Recipe (400 steps)": {},
    "Little memory": {"batch_size": 2, "gradient_accumulation": 4},
}
RECIPE = "Recipe (400 steps)"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Length and batch": ("steps", "batch_size", "gradient_accumulation", "seed"),
    "Adapter": ("variant", "rank", "alpha", "targets", "vectors", "dropout"),
    "Learning": (
        "rate_tokens", "rate_text_encoder", "rate_unet", "schedule", "warmup_steps",
        "weight_decay", "max_gradient_norm",
    ),
    "Pictures": ("resolution", "aspect_buckets", "copies", "flip"),
    "Keeping what the base knows": (
        "preservation", "preservation_rows", "prior_weight", "prior_images",
    ),
}  # fmt: skip
"""Heading → fields of `TrainConfig`; those that stand nowhere come under "More"."""


@dataclass(frozen=True)
class Field:
    """One field of a schema as a widget shows it.

    Attributes:
        kind: "choice", "switch" or "number".
        optional: may be left empty.
    """

    name: str
    kind: Literal["choice", "switch", "number"]
    default: Any
    info: str
    choices: tuple[str, ...] = ()
    whole: bool = False
    optional: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize()


def form(model: type[BaseModel] = TrainConfig) -> dict[str, list[Field]]:
    """Heading → fields, every one of the model in one place."""
    fields = {name: _field(name, info) for name, info in model.model_fields.items()}
    placed = {name for names in GROUPS.values() for name in names}
    groups = {heading: [fields[n] for n in names] for heading, names in GROUPS.items()}
    return {**groups, "More": [field for name, field in fields.items() if name not in placed]}


def changed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the recipe.

    Raises:
        ConfigError: names the field and says what is wrong.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    config = validate(TrainConfig, given, "settings")
    return config.model_dump(exclude_defaults=True)


def submit_training(
    workspace: Workspace, store: JobStore, name: str, settings: Mapping[str, Any], every: int
) -> Job:
    """Put a training of a concept folder into the queue.

    Args:
        settings: of `TrainConfig`.
        every: steps between two sample pictures; 0 for none.

    Raises:
        ConfigError: there is no such folder, or a setting is wrong.
        ResourceError: the queue is full.
    """
    if name not in find_subjects(workspace):
        raise ConfigError("There is nothing to train", "make a concept under Concepts first")
    if any(job.is_open and job.kind == "train" and job.title == name for job in store.jobs()):
        raise ConfigError(f"{name} is being trained already", "wait for its end, or stop it")
    words = ["train", str(workspace.subjects / name), *workspace.base.option]
    words += [part for k, v in changed(settings).items() for part in ("-s", f"{k}={_text(v)}")]
    if every:
        words += ["--sample-every", str(int(every))]
    output = workspace.concepts / f"{name}.safetensors"
    words += ["--library", str(workspace.library.path), "-o", str(output)]
    job = store.submit("train", name, words, output)
    workspace.concepts.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(first_picture(workspace, name), output.with_suffix(".jpg"))
    return job


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field(name: str, info: FieldInfo) -> Field:
    kind, optional = _unwrapped(info.annotation)
    common = {"name": name, "default": info.default, "info": info.description or ""}
    if get_origin(kind) is Literal:
        return Field(kind="choice", choices=get_args(kind), **common)
    if kind is bool:
        return Field(kind="switch", **common)
    return Field(kind="number", whole=kind is int, optional=optional, **common)


def _unwrapped(annotation: Any) -> tuple[Any, bool]:
    """A type without `| None`, and whether that stood there."""
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (kind for kind in get_args(annotation) if kind is not type(None))
        return inner, True
    return annotation, False
