"""What is compared, how it is trained, drawn and judged: one TOML file a preset."""

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.schema import NAME_PATTERN
from sbora_diffusion.core.settings import read_toml, validate
from sbora_diffusion.diffusion.baselines.interface import Method
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.evaluation.prompt_sets import WORDINGS
from sbora_diffusion.evaluation.protocols import PROTOCOLS, RAW_COSINE

FOLDER = Path(__file__).parent / "presets"
Changes = Mapping[str, Any]
"""Settings of a `TrainConfig`."""
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Entry(_Part):
    """One method with a recipe.

    Attributes:
        method: a key of `METHODS`.
        title: in tables; the method's own by default.
        changes: in the recipe, above the preset's common ones.
        grid: what it is tuned over; nothing by default.
        tuned_as: the entry whose tuning it takes; its own by default.
        merged: whether it takes part in merging.
    """

    method: str
    title: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    grid: str | None = None
    tuned_as: str | None = None
    merged: bool = True

    @model_validator(mode="after")
    def _the_method_is_known(self) -> "Entry":
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}, known are {', '.join(METHODS)}")
        return self

    @property
    def how(self) -> Method[Any]:
        return METHODS[self.method]

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.title or self.how.title


class Tuning(_Part):
    """Trials of learning rates and steps, as many for each method.

    Attributes:
        folder: with a folder of each subject.
        subjects: none of them among the preset's concepts.
        num: pictures of each prompt.
        grids: name → axis → changes; trials are all combinations.
    """

    folder: Path = Path("build/concepts")
    subjects: tuple[Name, ...] = ()
    num: int = Field(1, ge=1, le=1000)
    grids: dict[str, dict[str, tuple[dict[str, Any], ...]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _budgets_are_equal(self) -> "Tuning":
        sizes = {name: math.prod(map(len, axes.values())) for name, axes in self.grids.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every method must have as many trials, grids have {sizes}")
        return self

    def trials(self, grid: str) -> list[dict[str, Any]]:
        """What each trial changes in a recipe."""
        axes = self.grids[grid].values()
        return [{k: v for part in parts for k, v in part.items()} for parts in product(*axes)]


class Preset(_Part):
    """All that decides the figures, beside the machine. Unknown keys are refused.

    Attributes:
        clip: the judge of texts and pictures, MODEL[:PRETRAINED].
        dino: weights of DINO ViT-S/16, a further judge.
        wording: of the prompts, see `load_prompts`.
        concepts: folders in `concepts_folder`; all with a concept.toml by default. A concept's slot
            is its place here.
        num: pictures of each prompt; `merge_num` before and after merging, as many by default.
        picture_seed: picture k of each prompt starts from picture_seed + k.
        at_once: concepts in one training's batch.
        drawn_at_once: pictures in one batch.
        together: how many concepts are merged, beside all of them.
        common: changes in every recipe.
        tables: name → its entries, in the order of the rows.
        tuned: the record that `sbora bench tune` writes; without it recipes are as they are.
        page: where the tables go.
    """

    name: str
    base: str
    clip: str
    dino: str | None = None
    protocols: tuple[str, ...] = (RAW_COSINE.name, "mix-of-show")
    wording: str
    concepts_folder: Path
    concepts: tuple[Name, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...] = Field(min_length=1)
    num: int = Field(ge=1, le=1000)
    merge_num: int | None = Field(None, ge=1, le=1000)
    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(4.0, ge=0)
    negative_prompt: str = ""
    picture_seed: int = Field(20_000_000, ge=0, lt=1 << 62)
    at_once: int = Field(16, ge=1, le=1000)
    drawn_at_once: int = Field(128, ge=1, le=10_000)
    together: tuple[Annotated[int, Field(ge=2)], ...] = (3,)
    common: dict[str, Any] = Field(default_factory=dict)
    methods: dict[Name, Entry] = Field(min_length=1)
    tables: dict[Name, tuple[str, ...]] = Field(default_factory=dict)
    tuning: Tuning = Field(default_factory=lambda: Tuning(num=1))
    tuned: Path | None = None
    page: Path

    @model_validator(mode="after")
    def _names_are_known(self) -> "Preset":
        for protocol in (*self.protocols, RAW_COSINE.name):
            _known("protocol", protocol, PROTOCOLS)
        if RAW_COSINE.name not in self.protocols:
            raise ValueError("raw-cosine must be among the protocols: others derive from it")
        _known("wording", self.wording, WORDINGS)
        for entries in self.tables.values():
            for name in entries:
                _known("table: method", name, self.methods)
        for entry in self.methods.values():
            if entry.grid is not None:
                _known("grid", entry.grid, self.tuning.grids)
            if entry.tuned_as is not None:
                _known("tuned_as", entry.tuned_as, self.methods)
        if both := sorted(set(self.concepts) & set(self.tuning.subjects)):
            raise ValueError(f"{both[0]!r} is reported, and must not be tuned on")
        return self

    def config(self, entry: str, seed: int, tuned: Changes | None = None) -> TrainConfig:
        """The recipe of one training: the method's, then common, own and tuned changes.

        Raises:
            ConfigError: a change is unknown or out of range.
        """
        own = self.methods[entry]
        values = own.how.config.model_dump() | self.common | own.changes | dict(tuned or {})
        return validate(TrainConfig, {**values, "seed": seed}, f"{self.name}: {entry}")

    def drawing(self, num: int) -> dict[str, Any]:
        """What decides a picture beside model, prompt and its number."""
        keys = ("steps", "guidance", "negative_prompt", "picture_seed")
        return {"num": num, **{key: getattr(self, key) for key in keys}}


def _known(kind: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{kind} {name!r} is not known, known are {', '.join(known)}")


def load_preset(
    name: str, file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Preset:
    """A preset with changes.

    Args:
        name: of one that comes with the package, or a TOML file.
        file: TOML with further settings, above the preset's.
        overrides: above both.

    Raises:
        ConfigError: there is none, or a setting is unknown or out of range.
    """
    place = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not place.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise ConfigError(f"there is no preset {name!r}", f"one of {known}, or a TOML file")
    values: dict[str, Any] = {"name": place.stem, **read_toml(place)}
    for more in (read_toml(file) if file else {}, overrides or {}):
        values = _above(values, more)
    return validate(Preset, values, f"preset {place.stem}")


def _above(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others above them, tables inside them alike."""
    found = dict(values)
    for key, value in more.items():
        own = found.get(key)
        both = isinstance(own, Mapping) and isinstance(value, Mapping)
        found[key] = _above(own or {}, value) if both else value
    return found
