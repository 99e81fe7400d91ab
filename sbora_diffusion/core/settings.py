"""Settings from TOML files and `key=value` overrides, refused when unknown or out of range."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sbora_diffusion.core.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "mend that line") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["rank=4", "rate_unet=1e-4"]` → values typed as TOML types them, else plain strings.

    Raises:
        ConfigError: a pair has no equals sign.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {pair!r} must be key=value")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            parsed = {}
        values[key.strip()] = parsed["value"] if len(parsed) == 1 else text.strip()
    return values


def validate(model: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Build settings; the first problem becomes one line that names its source.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing or a wrong value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = sorted(model.model_fields)
            raise ConfigError(f"{source}: unknown key {key!r}", nearest(key, known)) from error
        if first["type"] == "missing":
            raise ConfigError(f"{source}: key {key!r} is missing", f"add {key} = …") from error
        message = first["msg"].removeprefix("Value error, ")
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        raise ConfigError(f"{source}: {key}: {message}{found}", f"change {key}") from error


def nearest(key: str, known: Sequence[str], what: str = "keys") -> str:
    """A remedy for an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known {what}: {', '.join(known)}"
