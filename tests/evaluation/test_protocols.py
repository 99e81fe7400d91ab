"""Published conventions against their definitions, written out with plain numbers."""

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.evaluation.metrics import first_reference_alignment, image_alignment
from sbora_diffusion.evaluation.protocols import (
    CUSTOM_DIFFUSION,
    MIX_OF_SHOW,
    OPENAI_CLIP,
    PROTOCOLS,
    RAW_COSINE,
    find_protocol,
    in_plain_words,
    without_tokens,
)
from tests.evaluation.test_metrics import cosine, features


def printed_by_the_script(images, references):
    """Mix-of-Show's clipscore_image_alignment.py: all scores in one list, zipped with the names."""
    scores = [max(cosine(image, ref), 0) for ref in references for image in images]
    by_name = dict(zip([f"{k}.png" for k in range(len(images))], scores, strict=False))
    return by_name


@pytest.mark.parametrize(("count", "references"), ((7, 3), (2, 6), (1, 1), (4, 4)))
def test_the_script_compares_every_picture_with_the_first_reference_alone(count, references):
    images, others = features(count, 1), features(references, 2)
    expected = printed_by_the_script(images.tolist(), others.tolist())
    assert len(expected) == count
    found = first_reference_alignment(images, others)
    assert found.tolist() == pytest.approx(list(expected.values()), abs=1e-6)


def test_first_reference_is_neither_all_pairs_nor_pairs_of_the_same_number():
    images, others = features(5, 3), features(5, 4)
    found = first_reference_alignment(images, others)
    diagonal = [max(cosine(a, b), 0) for a, b in zip(images.tolist(), others.tolist(), strict=True)]
    assert found[1:].tolist() != pytest.approx(diagonal[1:], abs=1e-3)
    assert (found - image_alignment(images, others)).abs().max() > 1e-3
    assert torch.equal(found, first_reference_alignment(images, others[:1]))


@pytest.mark.parametrize("protocol", (MIX_OF_SHOW, CUSTOM_DIFFUSION))
def test_published_text_alignment_is_two_and_a_half_times_a_cosine_that_is_not_negative(protocol):
    images, texts = features(9, 5), features(9, 6)
    cosines = [cosine(a, b) for a, b in zip(images.tolist(), texts.tolist(), strict=True)]
    assert min(cosines) < 0 < max(cosines)
    expected = [2.5 * max(value, 0) for value in cosines]
    assert protocol.text_alignment(images, texts).tolist() == pytest.approx(expected, abs=1e-6)
    raw = RAW_COSINE.text_alignment(images, texts)
    assert raw.tolist() == pytest.approx(cosines, abs=1e-6)


def test_each_protocol_gives_the_image_figures_that_it_names():
    images, others = features(4, 7), features(3, 8)
    pairs = image_alignment(images, others)
    for protocol in (RAW_COSINE, CUSTOM_DIFFUSION):
        (found,) = protocol.image_alignments("clip", images, others).items()
        assert found[0] == "clip" and torch.equal(found[1], pairs)
    both = MIX_OF_SHOW.image_alignments("clip", images, others)
    assert list(both) == ["clip", "clip, first-reference"]
    assert torch.equal(both["clip"], pairs)
    first = first_reference_alignment(images, others)
    assert torch.equal(both["clip, first-reference"], first)


def test_class_words_stand_for_tokens_and_are_not_doubled():
    assert in_plain_words("<a> on <b>, <a>", {"<a>": "cat", "<b>": "table"}) == "cat on table, cat"
    nouns = {"<bear>": "teddy bear", "<catA>": "cat"}
    assert in_plain_words("a <bear> teddy bear in snow", nouns) == "a teddy bear in snow"
    assert in_plain_words("a <catA> catfish", nouns) == "a cat catfish"
    assert in_plain_words("a <bear>, <new1>", nouns) == "a teddy bear, <new1>"
    assert in_plain_words("a <a+b>", {"<a+b>": r"\1 cat"}) == r"a \1 cat"


def test_custom_diffusion_takes_modifier_tokens_out_and_the_others_leave_them():
    prompt = "photo of a <new1> cat near <bear>"
    assert without_tokens(prompt) == "photo of a cat near"
    assert CUSTOM_DIFFUSION.plain(prompt, {"<bear>": "bear"}) == "photo of a cat near bear"
    assert MIX_OF_SHOW.plain(prompt, {"<bear>": "bear"}) == "photo of a <new1> cat near bear"
    assert RAW_COSINE.plain(prompt, {}) == prompt
    assert without_tokens("a < b > c") == "a < b > c"


def test_a_protocol_states_and_records_all_that_decides_its_figures():
    stated = MIX_OF_SHOW.stated()
    for part in ("mix-of-show", "2.5 × max(cosine, 0)", "'A photo depicts '", "first reference"):
        assert part in stated
    assert (
        "token removed" in CUSTOM_DIFFUSION.stated() and "behind" not in CUSTOM_DIFFUSION.stated()
    )
    assert RAW_COSINE.stated() == (
        "raw-cosine: text cosine, class word for the token; image cosine, all pairs"
    )
    record = MIX_OF_SHOW.record("pocket-clip")
    assert record["prefix"] == "A photo depicts " and record["text_scale"] == 2.5
    assert record["published_clip"] == OPENAI_CLIP and record["clip_as_published"] is False
    assert MIX_OF_SHOW.record(OPENAI_CLIP)["clip_as_published"] is True
    assert RAW_COSINE.record("pocket-clip")["clip_as_published"] is True


def test_presets_are_found_by_name_and_others_refused():
    assert [find_protocol(name).name for name in PROTOCOLS] == list(PROTOCOLS)
    assert list(PROTOCOLS) == ["raw-cosine", "mix-of-show", "custom-diffusion"]
    with pytest.raises(ConfigError, match="did you mean 'mix-of-show'"):
        find_protocol("mix_of_show")
    with pytest.raises(ConfigError, match="one of raw-cosine, mix-of-show, custom-diffusion"):
        find_protocol("xyz")
