"""Placeholder tokens in the text of a prompt."""

import pytest

from sbora_diffusion.diffusion.prompts import spelled, tokens_in, with_nouns


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a photo of <cat> and <dog>", ["<cat>", "<dog>"]),
        ("<dog><cat> <dog>", ["<dog>", "<cat>"]),
        ("a <Cat> and a <CAT>", ["<cat>"]),
        ("two <cat>s, <<cat>>, x<cat>y", ["<cat>"]),
        ("a <cat2> and a <cat-2>", ["<cat2>", "<cat-2>"]),
        ("1 < 2 > 0, <>, < cat>, <ca t>, <kätzchen>", []),
        ("", []),
    ],
)
def test_tokens_are_found_whole_in_any_case_and_once(prompt, tokens):
    assert tokens_in(prompt) == tokens


def test_tokens_are_spelled_as_the_vocabulary_has_them_and_the_rest_is_kept():
    assert spelled("A <CAT2> in Paris, <3 and <Cat>s") == "A <cat2> in Paris, <3 and <cat>s"
    assert spelled("<cat>_1 and <cat>_x") == "<cat> _1 and <cat>_x"


def test_nouns_take_the_place_of_their_tokens_and_say_where_they_stand():
    replaced = with_nouns("two <Cat>s, a <dog> and <cat>", {"<cat>": "big cat", "<fox>": "fox"})
    assert replaced.text == "two big cats, a <dog> and big cat"
    assert [replaced.text[a:b] for a, b in replaced.spans["<cat>"]] == ["big cat", "big cat"]
    assert replaced.spans["<fox>"] == []
