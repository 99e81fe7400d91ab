import dataclasses

import pytest
import torch

from sbora_diffusion.check import members, prices, static_findings
from sbora_diffusion.core.concept import TokenMeta, read_concept, sealed
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.fingerprint import fingerprint
from sbora_diffusion.core.renaming import renamed
from sbora_diffusion.renames import asked_rename, offered_renames, write_renamed
from tests.core.concept_examples import SHAPES, make_base, make_concept


def group(*concepts):
    return members([(f"{k}.safetensors", sealed(c), 1.0) for k, c in enumerate(concepts)])


def kinds(findings) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.blocks) for finding in findings]


def half(base):
    return {name: weight.half().float() for name, weight in base.items()}


def test_concepts_in_slots_of_their_own_have_no_findings():
    fine = group(make_concept("dog"), make_concept("cat", slot=1), make_concept("owl", slot=3))
    assert static_findings(fine) == []
    assert static_findings(fine, fingerprint(make_base().items())) == []
    assert prices(fine) == [
        "SBoRA-FA: 3 concepts at rank 4 own 12 of 16 columns (75 %) of the narrowest layers; "
        "1 more at rank 4 fit"
    ]


def test_everything_that_is_wrong_is_found_at_once():
    dog, cat = make_concept("dog"), make_concept("cat", base=make_base(seed=1))
    found = static_findings(
        group(dog, cat, renamed(make_concept("owl", slot=1), {"<owl>": "<cat>"}))
    )
    assert kinds(found) == [("base", True), ("base", True), ("overlap", True), ("token", True)]


def test_an_overlap_names_the_concepts_the_count_and_the_layers():
    other = make_concept("cat", slot=1)
    layer = max(SHAPES)
    stolen = dataclasses.replace(other.layers[layer], indices=make_concept().layers[layer].indices)
    other = dataclasses.replace(other, layers={**other.layers, layer: stolen})
    (found,) = static_findings(group(make_concept("dog"), other))
    assert f"dog and cat share 4 columns in 1 layer (1 cross-attention), the first is {layer}" in (
        found.text
    )
    assert found.facts == {"concepts": ["dog", "cat"], "layers": {layer: 4}}
    (allowed,) = static_findings(group(make_concept("dog"), other), allow_overlap=True)
    assert (found.blocks, allowed.blocks) == (True, False)


def test_an_fa_and_an_fb_concept_share_entries_which_is_noted_but_blocks_nothing():
    mixed = group(make_concept("dog", "fb", rank=2), make_concept("cat", "fa", rank=4))
    (found,) = static_findings(mixed)
    assert kinds([found]) == [("mixed", False)]
    assert found.text.startswith("cat of SBoRA-FA and dog of SBoRA-FB cross: two of them share")
    assert "r_a·r_b = 8 entries of a layer, 24 in all" in found.text
    (pair,) = found.facts["pairs"]
    assert pair == {"concepts": ["cat", "dog"], "layers": dict.fromkeys(SHAPES, 8)}
    assert [line[:8] for line in prices(mixed)] == ["SBoRA-FA", "SBoRA-FB"]


def test_a_rounded_copy_of_the_base_is_noted_and_another_base_blocks():
    rounded = make_concept("cat", slot=1, base=half(make_base()))
    foreign = make_concept("owl", slot=2, base=make_base(seed=1))
    assert kinds(static_findings(group(make_concept("dog"), rounded))) == [("base", False)]
    base = fingerprint(make_base().items())
    found = static_findings(group(make_concept("dog"), rounded, foreign), base)
    assert kinds(found) == [("base", True), ("base", False)]
    assert found[0].text.startswith("owl: this is not the base")
    assert "cat was trained on a rounded copy" in found[1].text


def test_one_file_given_twice_is_told_from_two_concepts_of_one_name():
    dog = make_concept("dog")
    assert kinds(static_findings(group(dog, dog), allow_overlap=True)) == [
        ("name", True),
        ("overlap", False),
    ]
    assert offered_renames(group(dog, dog)) == []
    namesakes = group(dog, make_concept("dog", slot=1))
    assert kinds(static_findings(namesakes)) == [("name", True), ("token", True)]
    assert [member.label for member in namesakes] == ["dog", "dog#2"]


def test_labels_differ_even_where_name_and_place_are_one():
    dog, other = sealed(make_concept("dog")), sealed(make_concept("dog", slot=1))
    same_place = members([("set", dog, 1.0), ("set", other, 1.0)])
    assert len({member.label for member in same_place}) == 2


def test_renames_are_offered_to_the_later_of_those_that_clash_and_solve_it(tmp_path):
    clash = group(
        make_concept("dog"),
        make_concept("dog", slot=1),
        renamed(make_concept("cat", slot=2), {"<cat>": "<dog>"}),
        renamed(make_concept("owl", slot=3), {"<owl>": "<dog-2>"}),
    )
    offers = offered_renames(clash)
    assert [(o.member.place, o.tokens, o.name) for o in offers] == [
        ("1.safetensors", {"<dog>": "<dog-3>"}, "dog-2"),
        ("2.safetensors", {"<dog>": "<dog-4>"}, None),
    ]
    copies = write_renamed(offers, tmp_path / "new")
    renewed = [
        (m.place, read_concept(copies[m.label][0]) if m.label in copies else m.concept, 1.0)
        for m in clash
    ]
    assert static_findings(members(renewed)) == []


def test_what_is_offered_can_be_asked_for():
    clash = group(make_concept("dog"), make_concept("dog", slot=1))
    (offer,) = offered_renames(clash)
    assert offer.option == "'1.safetensors=<dog-2>'"
    asked = asked_rename(clash, offer.option.strip("'"))
    assert (asked.tokens, asked.name) == ({"<dog>": "<dog-2>"}, "dog-2")


def test_a_rename_is_found_by_name_or_file_and_keeps_a_name_that_is_its_own():
    two = members([("a/dog.safetensors:0.8", sealed(make_concept("dog")), 0.8)])
    for key in ("dog", "a/dog.safetensors", "a/dog.safetensors:0.8"):
        found = asked_rename(two, f"{key}=<rex>")
        assert (found.tokens, found.name, found.file) == (
            {"<dog>": "<rex>"},
            None,
            "rex.safetensors",
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dog", "must be NAME=<token>"),
        ("=<x>", "must be NAME=<token>"),
        ("dog=<cat>", "in use"),
        ("dog=Rex", "cannot be called"),
        ("owl=<x>", "no concept is called 'owl'"),
    ],
)
def test_renames_that_make_no_sense_are_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        asked_rename(group(make_concept("dog"), make_concept("cat", slot=1)), text)


def test_an_ambiguous_name_or_token_is_refused():
    namesakes = group(make_concept("dog"), make_concept("dog", slot=1))
    with pytest.raises(ConfigError, match="several concepts are called 'dog'"):
        asked_rename(namesakes, "dog=<x>")
    assert asked_rename(namesakes, "dog#2=<x>").member is namesakes[1]
    dog = make_concept("dog")
    tokens = (*dog.meta.tokens, TokenMeta(token="<tail>", initializer="tail"))
    meta = dog.meta.model_copy(update={"tokens": tokens})
    two = dataclasses.replace(
        dog, meta=meta, embeddings={**dog.embeddings, "text_encoder.<tail>": torch.ones(1, 16)}
    )
    with pytest.raises(ConfigError, match="2 tokens"):
        asked_rename(group(two), "dog=<x>")
    clash = group(renamed(make_concept("cat", slot=1), {"<cat>": "<tail>"}), two)
    assert asked_rename(clash, "dog=<x>").tokens == {"<tail>": "<x>"}


def test_nothing_is_overwritten_and_nothing_is_written_by_halves(tmp_path):
    clash = group(make_concept("dog"), make_concept("dog", slot=1), make_concept("dog", slot=2))
    offers = offered_renames(clash)
    (tmp_path / "dog-3.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"dog-3.safetensors exists already"):
        write_renamed(offers, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dog-3.safetensors"]
    with pytest.raises(ConfigError, match="two renames"):
        write_renamed([offers[0], offers[0]], tmp_path)
