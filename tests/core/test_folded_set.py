"""A folded set reached by any way equals the one built at once, bit for bit."""

import hashlib
import random

import pytest
import torch
from torch import nn

from sbora_diffusion.core.concept import Concept, sealed
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, NonFiniteError
from sbora_diffusion.core.folded_set import FoldedSet
from tests.core.concept_examples import SHAPES, make_base, make_concept

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARY = [  # FA and FB, of ranks 4 and 2; twin and cousin overlap robot, shade overlaps row
    *(("robot", "fa", 4, 0), ("fox", "fa", 4, 1), ("mug", "fa", 4, 2), ("lamp", "fa", 2, 7)),
    *(("twin", "fa", 4, 0), ("cousin", "fa", 2, 1)),
    *(("row", "fb", 4, 0), ("line", "fb", 4, 1), ("shade", "fb", 2, 0)),
]


@pytest.fixture(scope="module")
def library() -> list[Concept]:
    return [sealed(make_concept(name, v, rank, slot)) for name, v, rank, slot in LIBRARY]


def model(dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    layers = {}
    for name, weight in make_base().items():
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layers


def digest(layers: dict[str, nn.Linear]) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for name in sorted(layers):
        found.update(layers[name].weight.detach().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def built(concepts, dtype: torch.dtype = torch.float32) -> str:
    layers = model(dtype)
    FoldedSet(layers).switch(concepts)
    return digest(layers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forty_orders_of_eight_concepts_give_the_same_bytes(library, dtype):
    weighted = [(concept, 0.3 + k / 7) for k, concept in enumerate(library[:8])]
    expected, rng = built(weighted, dtype), random.Random(0)
    for _ in range(40):
        rng.shuffle(weighted)
        one_by_one = model(dtype)
        folded = FoldedSet(one_by_one)
        for k in range(len(weighted)):
            folded.switch(weighted[: k + 1])
        assert built(weighted, dtype) == digest(one_by_one) == expected
    assert expected != digest(model(dtype))


@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float32, 1000), (torch.bfloat16, 100), (torch.float16, 100)]
)
def test_random_operations_equal_a_fresh_build_each_time(library, dtype, count, record_property):
    rng, current = random.Random(1), {}
    layers = model(dtype)
    folded, builds, sizes = FoldedSet(layers), {}, set()
    for _ in range(count):
        _random_operation(rng, library, current)
        pairs = [(library[k], weight) for k, weight in current.items()]
        folded.switch(pairs)
        key = tuple(sorted(current.items()))
        builds[key] = builds.get(key) or built(pairs, dtype)
        assert digest(layers) == builds[key]
        sizes.add(len(current))
    assert len(sizes) > 7 and len(builds) > 0.7 * count
    record_property("21 operations switched", count)


def _random_operation(rng: random.Random, library: list[Concept], current: dict) -> None:
    """Add, remove, change a weight, go to another set, or remove all."""
    k, weight = rng.randrange(len(library)), rng.choice([-0.5, 0.0, 0.7, 1.0, 1.3])
    chance = rng.random()
    if chance < 0.01:
        current.clear()
    elif chance < 0.1:
        current |= dict.fromkeys(rng.sample(range(len(library)), rng.randint(1, 9)), weight)
    elif chance < 0.5 and current:
        del current[rng.choice(list(current))]
    else:
        current[k] = weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_subset_removed_equals_merging_the_others_and_all_removed_the_base(library, dtype):
    weighted = [(concept, 1.0) for concept in library]
    rng = random.Random(2)
    for _ in range(20):
        rest = rng.sample(weighted, rng.randint(0, len(weighted)))
        layers = model(dtype)
        folded = FoldedSet(layers)
        folded.switch(weighted)
        folded.switch(rest)
        assert digest(layers) == built(rest, dtype)
        folded.switch([])
        assert digest(layers) == digest(model(dtype))


def test_subtracting_a_concept_would_not_give_the_base_back(library):
    """The tests above could not fail if subtraction were exact."""
    layers, expected = model(), digest(model())
    FoldedSet(layers).switch([(library[0], 1.0)])
    for name, stored in library[0].layers.items():
        layers[name].weight[:, stored.indices.long()] -= stored.factor
    assert digest(layers) != expected


def test_a_switch_writes_only_rows_and_columns_of_concepts_that_differ(library, monkeypatch):
    layers = model()
    folded = FoldedSet(layers)
    robot, fox, mug, row = library[0], library[1], library[2], library[6]
    folded.switch([(robot, 1.0), (fox, 1.0), (row, 0.5)])
    written, real = [], torch.Tensor.index_copy_

    def spy(self, dim, at, block):
        if any(self is layer.weight for layer in layers.values()):
            written.append((dim, sorted(at.tolist())))
        return real(self, dim, at, block)

    monkeypatch.setattr(torch.Tensor, "index_copy_", spy)
    folded.switch([(robot, 1.0), (mug, 1.0), (row, 0.5)])
    own = [
        sorted([*fox.layers[name].indices.tolist(), *mug.layers[name].indices.tolist()])
        for name in sorted(layers)
    ]
    assert written == [(1, indices) for indices in own]
    assert folded.prepare(folded.concepts).layers == []


def test_untouched_entries_keep_their_bits_and_touched_ones_change(library):
    chosen = [library[1], library[7]]
    layers, before = model(torch.bfloat16), model(torch.bfloat16)
    FoldedSet(layers).switch([(concept, 1.0) for concept in chosen])
    for name, layer in layers.items():
        touched = torch.zeros(SHAPES[name], dtype=torch.bool)
        touched[:, chosen[0].layers[name].indices.long()] = True
        touched[chosen[1].layers[name].indices.long()] = True
        same = layer.weight.view(torch.int16) == before[name].weight.view(torch.int16)
        assert same[~touched].all() and not same[touched].all()


def test_on_an_error_in_the_last_layer_nothing_is_changed(library):
    layers = model(torch.float16)
    folded = FoldedSet(layers)
    folded.switch([(library[0], 1.0)])
    before = digest(layers)
    last = max(layers)
    stored = dict(library[1].layers)
    loud = type(stored[last])(stored[last].indices, stored[last].factor * 1e6)
    concept = sealed(Concept(library[1].meta, {**stored, last: loud}, library[1].embeddings))
    with pytest.raises(NonFiniteError, match=rf"{last}: concept 'fox'"):
        folded.switch([(library[0], 0.5), (concept, 1.0)])
    with pytest.raises(ConfigError, match="finite"):
        folded.switch([(library[1], float("nan"))])
    with pytest.raises(ConflictError, match="'fox' is given twice"):
        folded.switch([(library[1], 1.0), (library[1], 2.0)])
    assert digest(layers) == before and [c for c, _ in folded.concepts] == [library[0]]
    folded.switch([])
    assert digest(layers) == digest(model(torch.float16))


def test_an_interrupt_while_writing_undoes_what_was_written(library, monkeypatch):
    layers = model()
    folded = FoldedSet(layers)
    folded.switch([(library[0], 1.0), (library[6], 1.0)])
    before, calls, real = digest(layers), [], torch.Tensor.index_copy_

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    step = folded.prepare([(library[1], 1.0), (library[7], 1.0)])
    monkeypatch.setattr(torch.Tensor, "index_copy_", stops)
    with pytest.raises(KeyboardInterrupt):
        folded.commit(step)
    assert digest(layers) == before
    monkeypatch.undo()
    folded.switch([])
    assert digest(layers) == digest(model())


def test_a_layer_that_the_model_lacks_is_refused(library):
    layers = model()
    missing = min(layers)
    del layers[missing]
    with pytest.raises(BaseMismatch, match=missing):
        FoldedSet(layers).switch([(library[0], 1.0)])
