"""Placeholder tokens come and go without a trace, in an order of their own."""

import copy

import pytest
import torch

from sbora_diffusion.core.errors import ConflictError
from sbora_diffusion.diffusion.tokens import (
    PlaceholderTokens,
    TrainableTokens,
    refuse_known_token,
    vector_names,
    word_vectors,
)
from tests.diffusion.helpers import assert_untouched, snapshot


@pytest.fixture
def tokens(pocket):
    before = snapshot(pocket)
    placeholders = PlaceholderTokens(pocket.pipeline)
    yield placeholders
    placeholders.set({})
    assert_untouched(pocket, before)


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 192, generator=torch.Generator().manual_seed(seed))


def table(pocket) -> torch.Tensor:
    return pocket.pipeline.text_encoder.get_input_embeddings().weight


def ids(pocket, text: str) -> list[int]:
    """Token numbers without start, end and padding, expanded as stock diffusers does it."""
    tokenizer = pocket.pipeline.tokenizer
    converted = pocket.pipeline.maybe_convert_prompt(text, tokenizer)
    return tokenizer(converted, add_special_tokens=False).input_ids


def text_states(pocket, text: str) -> torch.Tensor:
    with torch.no_grad():
        return pocket.pipeline.encode_prompt(text, "cpu", 1, False)[0]


def test_several_vectors_are_named_as_stock_diffusers_names_them():
    assert vector_names("<cat>", 1) == ["<cat>"]
    assert vector_names("<cat>", 3) == ["<cat>", "<cat>_1", "<cat>_2"]


def test_rows_stand_in_sorted_order_whatever_the_order_of_adding(pocket, tokens):
    a, b, c = vectors(2, 0), vectors(1, 1), vectors(3, 2)
    expected = torch.cat([a, b, c])
    size = tokens.base_size
    for order in ("abc", "cab", "bca"):
        tokens.set({})
        for letter in order:
            tokens.add({f"<{letter}>": {"a": a, "b": b, "c": c}[letter]})
        assert torch.equal(table(pocket)[size:], expected)
        assert ids(pocket, "<a> <b> <c>") == list(range(size, size + 6))


def test_removing_a_token_packs_the_others_anew(pocket, tokens):
    tokens.add({"<a>": vectors(2, 0), "<b>": vectors(1, 1)})
    tokens.remove(["<a>"])
    assert torch.equal(table(pocket)[tokens.base_size :], vectors(1, 1))
    assert ids(pocket, "<b>") == [tokens.base_size]
    assert tokens.base_size + 1 == len(pocket.pipeline.tokenizer)
    assert "<a>" not in pocket.pipeline.tokenizer.get_vocab()


def test_the_base_rows_and_vocabulary_come_back_bit_for_bit(pocket):
    before, vocabulary = snapshot(pocket), pocket.pipeline.tokenizer.get_vocab()
    sentence = "a photo of a teddy bear <a> on grass"
    plain, states = ids(pocket, sentence), text_states(pocket, sentence)
    tokens = PlaceholderTokens(pocket.pipeline)
    tokens.add({"<a>": vectors(2, 0)})
    assert torch.equal(table(pocket)[: tokens.base_size], before[_table_key(before)])
    assert ids(pocket, sentence) != plain
    tokens.remove(["<a>"])
    assert_untouched(pocket, before)
    assert pocket.pipeline.tokenizer.get_vocab() == vocabulary
    assert ids(pocket, sentence) == plain
    assert torch.equal(text_states(pocket, sentence), states)


def _table_key(state: dict) -> str:
    (key,) = (key for key in state if key.endswith("token_embedding.weight"))
    return key


def test_the_global_random_state_is_neither_read_nor_written(pocket, tokens):
    state = torch.get_rng_state()
    tokens.add({"<a>": vectors(2, 0)})
    assert torch.equal(torch.get_rng_state(), state)
    first = table(pocket).clone()
    tokens.set({})
    with torch.random.fork_rng():
        torch.manual_seed(99)
        tokens.add({"<a>": vectors(2, 0)})
    assert torch.equal(table(pocket), first)


def test_a_token_of_the_vocabulary_is_refused_and_nothing_changes(pocket, tokens):
    tokens.add({"<a>": vectors(1, 0)})
    rows = len(table(pocket))
    for known in ("<a>", "<|endoftext|>"):
        with pytest.raises(ConflictError, match="already in the base's vocabulary"):
            tokens.add({"<new>": vectors(1, 1), known: vectors(1, 1)})
    assert len(table(pocket)) == rows == len(pocket.pipeline.tokenizer)
    refuse_known_token(pocket.pipeline, "<new>")


def test_a_token_that_starts_from_the_class_noun_gives_its_text_states_bit_for_bit(pocket, tokens):
    start = word_vectors(pocket.pipeline, "teddy bear")
    assert len(start) >= 2
    expected = text_states(pocket, "a photo of teddy bear on grass")
    tokens.add({"<x>": start})
    assert torch.equal(text_states(pocket, "a photo of <x> on grass"), expected)
    assert torch.equal(text_states(pocket, "a photo of teddy bear on grass"), expected)
    assert not torch.equal(text_states(pocket, "a photo of a cat on grass"), expected)


def test_word_vectors_are_a_copy_of_the_table_in_fp32(pocket):
    number = pocket.pipeline.tokenizer("bear", add_special_tokens=False).input_ids
    found = word_vectors(pocket.pipeline, "bear")
    assert torch.equal(found, table(pocket)[number]) and found.dtype == torch.float32
    found += 1
    assert not torch.equal(found, table(pocket)[number])


def test_only_the_placeholder_rows_train():
    embedding = torch.nn.Embedding.from_pretrained(vectors(10, 0), freeze=True)
    trainable = TrainableTokens(embedding, 3)
    numbers = torch.tensor([[0, 7, 9], [7, 3, 0]])
    trainable(numbers).sum().backward()
    assert [p.shape for p in trainable.parameters() if p.requires_grad] == [(3, 192)]
    assert embedding.weight.grad is None
    assert trainable.vectors.grad[:, 0].tolist() == [2, 0, 1]


def test_trainable_tokens_look_up_like_the_table_they_start_from_in_its_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        embedding = torch.nn.Embedding.from_pretrained(vectors(10, 0).to(dtype), freeze=True)
        numbers = torch.arange(10).reshape(2, 5)
        found = TrainableTokens(embedding, 4)(numbers)
        assert found.dtype == dtype and torch.equal(found, embedding(numbers))


def test_the_words_are_those_of_a_full_copy_of_the_tokenizer(pocket, tokens):
    base = pocket.pipeline.tokenizer
    full = copy.deepcopy(base)
    full.add_tokens(["<a>", "<a>_1"])
    tokens.add({"<a>": vectors(2, 0)})
    found = pocket.pipeline.tokenizer
    assert found.backend_tokenizer.to_str() == full.backend_tokenizer.to_str()
    assert found.get_vocab() == full.get_vocab() and "<a>" not in base.get_vocab()
    text = "a photo of <a> <a>_1 <|endoftext|>"
    assert found(text).input_ids == full(text).input_ids


def test_more_placeholders_than_the_spare_rows_fit_too(pocket, tokens):
    tokens.add({"<a>": vectors(2, 0)})
    many = {f"<b{k}>": vectors(100, k) for k in range(4)}
    tokens.add(many)
    expected = torch.cat([vectors(2, 0), *many.values()])
    assert torch.equal(table(pocket)[tokens.base_size :], expected)


def test_a_saved_tokenizer_does_not_depend_on_what_the_base_has_read(pocket, tokens, tmp_path):
    names = ("unread", "read")
    for name in names:
        tokens.set({"<cat>": vectors(2, 0)})
        pocket.pipeline.tokenizer.save_pretrained(tmp_path / name)
        tokens.set({})
        text_states(pocket, "a photo of a cat")
    unread, read = ((tmp_path / name / "tokenizer.json").read_bytes() for name in names)
    assert unread == read
