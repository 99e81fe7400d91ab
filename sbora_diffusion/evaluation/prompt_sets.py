"""Twenty prompts per concept in four groups, stored with the package as TOML."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.settings import read_toml, validate

FOLDER = Path(__file__).parent / "prompts"
WORDINGS = {"benchmark": FOLDER / "mix_of_show.toml", "pocket": FOLDER / "pocket.toml"}
GROUPS = ("recontextualisation", "restylisation", "interaction", "property")
_ARTICLE = re.compile(r"\b([Aa]) (?=\{\})")


def _one_place(template: str) -> str:
    if template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", "")):
        raise ValueError("must have one {} where the subject stands, and no other braces")
    return template


Template = Annotated[str, AfterValidator(_one_place)]
Five = Annotated[tuple[Template, ...], Field(min_length=5, max_length=5)]


class PromptSet(BaseModel):
    """Five templates of each group; the bare class noun or the token takes the place of {}.

    Attributes:
        category: what it is for.
        nouns: class nouns that it is for; without any it serves the rest of its category.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    category: Literal["character", "object", "scene"]
    nouns: tuple[str, ...] = ()
    recontextualisation: Five
    restylisation: Five
    interaction: Five
    property: Five

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group → its templates, in the order of `GROUPS`."""
        return {name: getattr(self, name) for name in GROUPS}

    def templates(self) -> list[str]:
        """All twenty, group after group."""
        return [template for group in self.groups().values() for template in group]

    def about(self, words: str) -> list[str]:
        """All twenty about a token or a bare class noun; "a" becomes "an" before a vowel."""
        return [filled(template, words) for template in self.templates()]


class PromptFile(BaseModel):
    """All sets of one wording, with their source and licence. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    licence: str
    sets: dict[str, PromptSet]

    def for_subject(self, category: str, class_noun: str) -> PromptSet:
        """The set for a class noun, else the one that serves the rest of the category.

        Raises:
            ConfigError: there is none.
        """
        for prompts in self.sets.values():
            if class_noun in prompts.nouns:
                return prompts
        for prompts in self.sets.values():
            if prompts.category == category and not prompts.nouns:
                return prompts
        known = sorted({prompts.category for prompts in self.sets.values()})
        raise ConfigError(
            f"there are no prompts for category {category!r}", f"one of {', '.join(known)}"
        )


def filled(template: str, words: str) -> str:
    """A template about something: ("a photo of a {}", "apple") → "a photo of an apple"."""
    if words[:1].lower() in tuple("aeiou"):
        template = _ARTICLE.sub(r"\1n ", template)
    return template.replace("{}", words)


@cache
def load_prompts(wording: str) -> PromptFile:
    """The prompts stored with the package.

    Args:
        wording: "benchmark", for bases of real size, or "pocket", in the words of its world.

    Raises:
        ConfigError: there is no such wording.
    """
    if wording not in WORDINGS:
        raise ConfigError(
            f"prompts {wording!r} are not known", f"one of {', '.join(sorted(WORDINGS))}"
        )
    return read_prompt_file(WORDINGS[wording])


def read_prompt_file(file: Path) -> PromptFile:
    """Read a file with prompts; groups under `[common]` belong to every set that lacks them.

    Raises:
        ConfigError: it cannot be read, has an unknown key, or a group has not five templates.
    """
    content = read_toml(file)
    common, sets = content.pop("common", {}), content.get("sets", {})
    if not isinstance(common, Mapping) or not isinstance(sets, Mapping):
        raise ConfigError(f"{file}: common and sets must be tables", "write [common], [sets.NAME]")
    content["sets"] = {name: _completed(own, common) for name, own in sets.items()}
    return validate(PromptFile, content, str(file))


def _completed(own: Any, common: Mapping[str, Any]) -> Any:
    return {**common, **own} if isinstance(own, Mapping) else own
