"""Settings from TOML and from key=value, refused in one line."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.settings import parse_overrides, read_toml, validate


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rank: int = Field(8, ge=1)
    rate_unet: float = 1e-3
    name: str


def refusal(values, **options):
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, values, options.get("source", "recipe.toml"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_have_the_types_of_toml():
    pairs = ["rank=4", "rate=1e-4", "flip=false", "name=robot", 'text="4"', "list=[1, 2]", "e="]
    assert parse_overrides(pairs) == {
        "rank": 4,
        "rate": 1e-4,
        "flip": False,
        "name": "robot",
        "text": "4",
        "list": [1, 2],
        "e": "",
    }


def test_an_override_may_hold_an_equals_sign_and_spaces():
    assert parse_overrides(["a=b=c", " k = v "]) == {"a": "b=c", "k": "v"}


def test_an_override_cannot_smuggle_in_a_second_key():
    assert parse_overrides(["a=1\nb=2"]) == {"a": "1\nb=2"}


def test_the_last_of_two_overrides_counts():
    assert parse_overrides(["a=1", "a=2"]) == {"a": 2}


def test_an_override_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="'rank' must be key=value"):
        parse_overrides(["rank"])


def test_an_override_without_a_key_is_refused():
    with pytest.raises(ConfigError, match="must be key=value"):
        parse_overrides(["=4"])


def test_good_settings_are_built():
    assert validate(Recipe, {"name": "x", "rank": 4}, "-s") == Recipe(name="x", rank=4)


def test_an_unknown_key_names_the_nearest_one_and_its_source():
    message = refusal({"name": "x", "rate_unte": 1}, source="my.toml")
    assert message == "my.toml: unknown key 'rate_unte'; did you mean 'rate_unet'?"


def test_an_unknown_key_far_from_all_lists_the_known_ones():
    assert refusal({"name": "x", "zzz": 1}).endswith("known keys: name, rank, rate_unet")


def test_a_missing_key_is_named():
    assert "key 'name' is missing" in refusal({})


@pytest.mark.parametrize("rank", [0, "many", None, 1.5])
def test_a_wrong_value_is_shown(rank):
    message = refusal({"name": "x", "rank": rank})
    assert message.startswith("recipe.toml: rank: ") and repr(rank) in message


def test_a_toml_file_is_read(tmp_path):
    (tmp_path / "a.toml").write_text('a = 1\nb = "ü"\n', encoding="utf-8")
    assert read_toml(tmp_path / "a.toml") == {"a": 1, "b": "ü"}


@pytest.mark.parametrize("content", [b"a = ", b"\xff", b"a = 1\na = 2\n"])
def test_what_is_not_toml_is_named(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.toml is not valid TOML"):
        read_toml(tmp_path / "a.toml")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_toml(path)
