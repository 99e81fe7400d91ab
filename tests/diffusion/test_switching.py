"""A folded pipeline goes from set to set: weights, words and embeddings as if built at once."""

import itertools
import random

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError, ConflictError, FormatError, NonFiniteError
from sbora_diffusion.diffusion.merging import Merged
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.diffusion.test_merging import hashes, merge_and_save

EIGHT = [
    *(("a", "fa", 0), ("b", "fa", 1), ("c", "fa", 2), ("d", "fa", 3), ("e", "fa", 4)),
    *(("f", "fb", 0), ("g", "fb", 1), ("h", "fb", 2)),
]


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


@pytest.fixture(scope="module")
def eight(pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    return [
        (strong_concept(pocket, folder, name, variant, slot, vectors=1 + slot % 3), 0.5 + slot / 8)
        for name, variant, slot in EIGHT
    ]


@pytest.fixture
def merged(pocket, original):
    held = Merged(pocket)
    assert not pocket.folded
    yield held
    held.restore()
    assert not pocket.folded
    assert_untouched(pocket, original)


def fresh(pocket, concepts) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    built = Merged(pocket, concepts)
    try:
        return snapshot(pocket), pocket.pipeline.tokenizer.get_vocab()
    finally:
        built.restore()


def assert_is(pocket, expected) -> None:
    tensors, vocabulary = expected
    assert_untouched(pocket, tensors)
    assert pocket.pipeline.tokenizer.get_vocab() == vocabulary


def test_any_way_to_a_set_gives_the_weights_and_words_of_building_it_at_once(pocket, eight):
    rng = random.Random(3)
    sets = [rng.sample(eight, count) for count in (3, 8, 1, 5)]
    expected = [fresh(pocket, chosen) for chosen in sets]
    held = Merged(pocket)
    try:
        for chosen, state in zip(sets, expected, strict=True):
            held.switch(chosen)
            assert_is(pocket, state)
    finally:
        held.restore()


def test_add_set_weight_and_remove_are_switches(pocket, eight):
    (a, _), (b, _), (f, _) = eight[0], eight[1], eight[5]
    expected = fresh(pocket, [(a, 0.2), (f, 1.0)])
    held = Merged(pocket)
    try:
        held.add(b)
        held.add(f)
        held.add(a, 3.0)
        held.set_weight("a", 0.2)
        held.remove("b")
        assert {c.meta.name: weight for c, weight in held.concepts} == {"a": 0.2, "f": 1.0}
        assert_is(pocket, expected)
        for act in (held.remove, lambda name: held.set_weight(name, 1.0)):
            with pytest.raises(ConflictError, match="no concept 'b' is folded"):
                act("b")
    finally:
        held.restore()


def test_on_any_error_weights_words_and_set_stay(pocket, eight, merged, tmp_path):
    merged.switch(eight[:2])
    before = snapshot(pocket), pocket.pipeline.tokenizer.get_vocab()
    (a, _), (c, _) = eight[0], eight[2]
    twin = strong_concept(pocket, tmp_path, "twin")
    narrow = type(c)(c.meta, c.layers, {"text_encoder.<c>": torch.zeros(1, 7)})
    wrong = [
        ([(a, 1.0), (twin, 1.0)], ConflictError),
        ([(a, 1.0), (a, 0.5)], ConflictError),
        ([(a, float("nan"))], ConfigError),
        ([(c, 1e39)], NonFiniteError),
        ([(narrow, 1.0)], FormatError),
    ]
    for concepts, error in wrong:
        with pytest.raises(error):
            merged.switch(concepts)
        assert_is(pocket, before)
        assert merged.concepts == sorted(eight[:2], key=lambda pair: pair[0].meta.digest)


def test_a_failure_while_writing_gives_the_words_back_too(pocket, eight, merged, monkeypatch):
    merged.switch(eight[:2])
    before = snapshot(pocket), pocket.pipeline.tokenizer.get_vocab()

    def stop(_step):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged._folded, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        merged.switch(eight[2:5])
    monkeypatch.undo()
    assert_is(pocket, before)


def test_overlapping_concepts_live_in_one_library_but_not_in_one_set(pocket, eight, tmp_path):
    twin = strong_concept(pocket, tmp_path, "twin")
    expected = fresh(pocket, [(twin, 1.0)])
    held = Merged(pocket)
    try:
        held.switch(eight[:1])
        held.switch([(twin, 1.0)])
        assert_is(pocket, expected)
        with pytest.raises(ConflictError, match="share 576 indices"):
            held.switch([*eight[:1], (twin, 1.0)])
    finally:
        held.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_file_of_the_model_folder_is_the_same_in_every_order(
    pocket, original, eight, tmp_path, dtype
):
    rng, found = random.Random(0), []
    for k in range(3):
        order = rng.sample(eight, len(eight))
        found.append(hashes(merge_and_save(pocket, tmp_path / str(k), order, dtype)))
    assert all(a == b for a, b in itertools.pairwise(found)) and len(found[0]) >= 10
    assert_untouched(pocket, original)


def test_another_holder_of_the_same_base_is_refused_while_concepts_are_folded(pocket, eight):
    first, second = Merged(pocket), Merged(pocket)
    first.switch(eight[:1])
    with pytest.raises(ConflictError, match="folded"):
        second.switch(eight[1:2])
    first.restore()
    second.switch(eight[1:2])
    second.restore()
