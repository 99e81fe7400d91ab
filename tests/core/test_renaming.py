import pytest
import torch

from sbora_diffusion.core.concept import TokenMeta, read_concept, sealed, write_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.renaming import free_name, free_token, renamed
from tests.core.concept_examples import make_concept


def two_tokens():
    concept = make_concept("robot")
    embeddings = {**concept.embeddings, "text_encoder.<arm>": torch.ones(1, 16)}
    tokens = (*concept.meta.tokens, TokenMeta(token="<arm>", initializer="arm"))
    meta = concept.meta.model_copy(update={"tokens": tokens})
    return sealed(type(concept)(meta, concept.layers, embeddings))


def test_a_renamed_copy_is_a_valid_file_with_its_own_digest_and_the_same_factors(tmp_path):
    concept = sealed(make_concept("robot"))
    copy = renamed(concept, {"<robot>": "<robbie>"}, "robbie")
    digest = write_concept(tmp_path / "r.safetensors", copy)
    back = read_concept(tmp_path / "r.safetensors")
    assert back.meta.digest == copy.meta.digest == digest != concept.meta.digest
    assert (back.meta.name, back.meta.tokens[0].token) == ("robbie", "<robbie>")
    assert back.meta.tokens[0].initializer == concept.meta.tokens[0].initializer
    assert back.meta.training == concept.meta.training
    assert list(back.embeddings) == ["text_encoder.<robbie>"]
    assert torch.equal(
        back.embeddings["text_encoder.<robbie>"], concept.embeddings["text_encoder.<robot>"]
    )
    for layer, stored in concept.layers.items():
        assert torch.equal(back.layers[layer].factor, stored.factor)
    assert b'"modelspec.trigger_phrase":"<robbie>"' in (tmp_path / "r.safetensors").read_bytes()


def test_renaming_there_and_back_gives_the_same_digest():
    concept = sealed(make_concept("robot"))
    there = renamed(concept, {"<robot>": "<x>"})
    assert renamed(there, {"<x>": "<robot>"}).meta.digest == concept.meta.digest


def test_only_the_given_one_of_several_tokens_changes():
    copy = renamed(two_tokens(), {"<arm>": "<hand>"})
    assert [entry.token for entry in copy.meta.tokens] == ["<robot>", "<hand>"]
    assert sorted(copy.embeddings) == ["text_encoder.<hand>", "text_encoder.<robot>"]


@pytest.mark.parametrize("new", ["robbie", "<Robbie>", "<>", "<a b>", "<arm>", ""])
def test_tokens_that_are_not_allowed_are_refused(new):
    with pytest.raises(ConfigError, match="cannot be called"):
        renamed(two_tokens(), {"<robot>": new})


def test_a_name_that_is_not_allowed_and_a_token_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="cannot be called"):
        renamed(make_concept("robot"), {}, "../x")
    with pytest.raises(ConfigError, match="no token '<cat>'"):
        renamed(make_concept("robot"), {"<cat>": "<x>"})


def test_free_names_are_the_first_that_are_not_taken_and_never_too_long():
    assert free_token("<dog>", {"<dog>", "<dog-2>"}) == "<dog-3>"
    assert free_name("dog", {"dog"}) == "dog-2"
    assert free_token(f"<{'d' * 62}>", ()) == f"<{'d' * 56}-2>"
    assert free_name("d" * 64, ()) == "d" * 58 + "-2"
