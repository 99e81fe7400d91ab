"""Folding layers together gives the bytes of folding them one by one, and costs what it says."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbora_diffusion.core import folded_set, merging, stacked_merging
from sbora_diffusion.core.compatibility import check_mergeable, shared_indices
from sbora_diffusion.core.concept import Concept, LayerFactor, sealed
from sbora_diffusion.core.errors import ConflictError, FormatError, NonFiniteError
from sbora_diffusion.core.folded_set import FoldedSet, Weighted, concept_updates
from tests.core.concept_examples import make_base, make_concept

SHAPES = {f"unet.block.{k}.to_q": ((16, 24), (20, 16))[k // 3] for k in range(5)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = [("a", 4, 0), ("b", 4, 1), ("c", 2, 4), ("d", 2, 5), ("e", 4, 3)]
"""Name, rank and slot: these share nothing."""
LIBRARIES = {
    "fa": [(name, "fa", rank, slot) for name, rank, slot in PLAIN],
    "fb": [(name, "fb", rank, slot) for name, rank, slot in PLAIN],
    "mixed": [*((n, "fa", r, s) for n, r, s in PLAIN[:3]), ("f", "fb", 4, 0), ("g", "fb", 2, 2)],
    "shared": [("a", "fa", 4, 0), ("b", "fa", 4, 1), ("t", "fa", 2, 0), ("u", "fa", 2, 3)],
}
Layers = dict[str, nn.Linear]


def made(kind: tuple[str, str, int, int], shapes: dict = SHAPES) -> Concept:
    name, variant, rank, slot = kind
    return sealed(make_concept(name, variant, rank, slot, shapes))


def library(which: str) -> list[Concept]:
    """The last one adapts some of the layers alone, the first has factors in half precision."""
    *kinds, last = LIBRARIES[which]
    few = {name: shape for k, (name, shape) in enumerate(SHAPES.items()) if k != 1}
    first, *concepts = [made(kind) for kind in kinds]
    half = {n: LayerFactor(s.indices, s.factor.half()) for n, s in first.layers.items()}
    return [sealed(replace(first, layers=half)), *concepts, made(last, few)]


def model(dtype: torch.dtype = torch.float32, shapes: dict = SHAPES) -> Layers:
    layers = {}
    for name, weight in make_base(shapes).items():
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = nn.Parameter(weight.to(dtype), requires_grad=True)
    return layers


def content(layers: Layers) -> dict[str, bytes]:
    return {n: ly.weight.detach().view(torch.uint8).numpy().tobytes() for n, ly in layers.items()}


def one_by_one(concepts: list[Weighted], dtype: torch.dtype) -> dict[str, bytes]:
    layers = model(dtype)
    for name, layer in layers.items():
        updates = [concept_updates(c, weight) for c, weight in concepts]
        merging.fold(layer.weight, [update[name] for update in updates if name in update])
    return content(layers)


@pytest.fixture(params=[1, 1 << 40], ids=["in_pieces", "all_at_once"])
def at_once(request, monkeypatch) -> None:
    monkeypatch.setattr(stacked_merging, "AT_ONCE", request.param)


@pytest.fixture
def prepared(monkeypatch) -> list[Tensor]:
    """Gets the weights of layers that are computed by themselves."""
    found, real = [], folded_set.prepare
    monkeypatch.setattr(
        folded_set, "prepare", lambda w, *rest: (found.append(w), real(w, *rest))[1]
    )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", LIBRARIES)
def test_random_switches_give_the_bytes_of_folding_each_layer_by_itself(
    which, dtype, at_once, prepared
):
    rng, concepts, layers = random.Random(0), library(which), model(dtype)
    folded = FoldedSet(layers)
    for _ in range(40):
        chosen = rng.sample(concepts, rng.randint(0, len(concepts)))
        pairs = [(concept, rng.choice([-0.5, 0.0, 0.7, 1.0])) for concept in chosen]
        folded.switch(pairs)
        assert content(layers) == one_by_one(pairs, dtype)
    folded.switch([])
    assert content(layers) == content(model(dtype))
    assert bool(prepared) == (which in ("mixed", "shared"))


@pytest.mark.parametrize("which", LIBRARIES)
def test_layers_that_were_cast_in_between_are_folded_as_each_by_itself(which, monkeypatch):
    concepts = library(which)

    def end() -> dict[str, bytes]:
        layers = model()
        folded = FoldedSet(layers)
        folded.switch([(concept, 1.0) for concept in concepts[:2]])
        for name in sorted(layers)[1:]:
            layers[name].bfloat16()
        folded.switch([(concepts[0], 1.0), (concepts[2], -1.0)])
        first = content(layers)
        layers[min(layers)].half()
        folded.switch([(concepts[2], 0.5)])
        return {**first, **{f"{name} later": raw for name, raw in content(layers).items()}}

    found = end()
    monkeypatch.setattr(FoldedSet, "_stacks", lambda self, step: [])
    assert found == end()


def test_an_unfolded_model_may_be_cast_and_is_folded_together_again(prepared):
    concepts, layers = library("fa"), model()
    folded = FoldedSet(layers)
    folded.switch([(concepts[0], 1.0)])
    folded.switch([])
    for layer in layers.values():
        layer.half()
    folded.switch([(concepts[1], 1.0)])
    assert content(layers) == one_by_one([(concepts[1], 1.0)], torch.float16)
    assert not prepared


def test_a_copy_of_a_concept_takes_its_place(prepared):
    concept, other = library("fb")[1:3]
    layers = model()
    folded = FoldedSet(layers)
    folded.switch([(concept, 1.0), (other, 1.0)])
    copy = Concept(concept.meta, dict(concept.layers), concept.embeddings)
    folded.switch([(copy, 0.5), (other, 1.0)])
    assert content(layers) == one_by_one([(copy, 0.5), (other, 1.0)], torch.float32)


def test_another_concept_with_the_digest_of_one_that_is_folded_replaces_it():
    """As unsealed ones have, which never were in a file."""
    name, *others = SHAPES
    one = make_concept("a", shapes={name: SHAPES[name]})
    other = make_concept("b", slot=1, shapes={layer: SHAPES[layer] for layer in others})
    wide = make_concept("c", slot=2, shapes=SHAPES)
    layers = model()
    folded = FoldedSet(layers)
    for concept in (one, other, wide, one):
        folded.switch([(concept, 1.0)])
        assert content(layers) == one_by_one([(concept, 1.0)], torch.float32)


@pytest.mark.parametrize("which", ["fa", "mixed"])
def test_an_interrupt_at_any_write_undoes_all_of_them(which, monkeypatch, at_once):
    concepts, layers = library(which), model(torch.bfloat16)
    folded = FoldedSet(layers)
    folded.switch([(concepts[0], 1.0), (concepts[1], 1.0)])
    before, real = content(layers), torch.Tensor.index_copy_
    wanted = [(concepts[0], 0.5), *((concept, 1.0) for concept in concepts[2:])]

    def interrupted(at: int) -> bool:
        """Was there a call of that number? It fails; those that undo the others do not."""
        calls = iter(range(at + 1))

        def stops(self, *arguments):
            if next(calls, None) == at:
                raise KeyboardInterrupt
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, "index_copy_", stops)
        try:
            folded.switch(wanted)
        except KeyboardInterrupt:
            return True
        finally:
            monkeypatch.setattr(torch.Tensor, "index_copy_", real)
        return False

    at = 0
    while interrupted(at):
        assert content(layers) == before
        assert [concept for concept, _ in folded.concepts] == [
            concept for concept in sorted(concepts[:2], key=lambda c: c.meta.digest)
        ]
        at += 1
    assert at >= len(layers)
    assert content(layers) == one_by_one(wanted, torch.bfloat16)


@pytest.mark.parametrize("value", [1e30, torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_by_layer_and_name_and_changes_nothing(value, at_once):
    good, other = library("fb")[1:3]
    layers = model(torch.float16)
    folded = FoldedSet(layers)
    folded.switch([(good, 1.0)])
    before, worst = content(layers), sorted(SHAPES)[3]
    stored = other.layers[worst]
    loud = LayerFactor(stored.indices, torch.full_like(stored.factor, value))
    bad = Concept(other.meta, {**other.layers, worst: loud}, other.embeddings)
    with pytest.raises(NonFiniteError, match=rf"{worst}: concept 'c'"):
        folded.switch([(good, 0.5), (bad, 1.0)])
    assert content(layers) == before
    folded.switch([])
    assert content(layers) == content(model(torch.float16))


def test_finite_entries_with_an_infinite_sum_are_folded():
    concept, layers = library("fa")[1], model()
    large = {
        n: LayerFactor(s.indices, s.factor.sign() * 0 + 1e37) for n, s in concept.layers.items()
    }
    concept = sealed(replace(concept, layers=large))
    FoldedSet(layers).switch([(concept, 1.0)])
    assert content(layers) == one_by_one([(concept, 1.0)], torch.float32)


@pytest.mark.parametrize("index", [-1, 24, "twice"])
def test_indices_outside_a_layer_or_given_twice_are_refused(index):
    concept, layers = library("fa")[1], model()
    name = sorted(SHAPES)[1]
    stored = concept.layers[name]
    indices = stored.indices.clone()
    indices[-1] = indices[0] if index == "twice" else index
    bad = LayerFactor(indices, stored.factor)
    before, folded = content(layers), FoldedSet(layers)
    with pytest.raises(FormatError, match=rf"{name}: concept 'b'"):
        folded.switch([(Concept(concept.meta, {**concept.layers, name: bad}), 1.0)])
    assert content(layers) == before and folded.concepts == []


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def operations(count: int, variant: str, action: str) -> Counter[str]:
    """Of an action on so many layers, all computed at once as on a GPU."""
    shapes = {f"unet.block.{k:02d}.to_q": (16, 16) for k in range(count)}
    concepts = [made((name, variant, 4, k), shapes) for k, name in enumerate("abcd")]
    folded, pairs = FoldedSet(model(shapes=shapes)), [(concept, 1.0) for concept in concepts]
    start, end = {
        "fold": ([], pairs[:1]),
        "switch": (pairs[:1], pairs[1:2]),
        "weight": (pairs, [(concepts[0], 0.5), *pairs[1:]]),
        "remove": (pairs, pairs[1:]),
        "merge all": ([], pairs),
        "remove all": (pairs, []),
    }[action]
    folded.switch(end)  # what is found out once about each concept
    folded.switch(start)
    with Counted() as counted:
        folded.switch(end)
    return counted.found


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize(
    "action", ["fold", "switch", "weight", "remove", "merge all", "remove all"]
)
def test_a_layer_costs_one_read_and_one_write_and_all_layers_one_wait(action, variant, monkeypatch):
    monkeypatch.setattr(stacked_merging, "AT_ONCE", 1 << 40)
    few, many = (operations(count, variant, action) for count in (8, 24))
    each = {name: (many[name] - few[name]) / 16 for name in many if many[name] != few[name]}
    assert each == {"aten.index_select": 1, "aten.index_copy_": 1}
    assert many["aten._local_scalar_dense"] <= 1
    assert many.total() - 2 * 24 < 60


def test_pairs_of_concepts_are_compared_once():
    first, second, third = (
        made(("a", "fa", 4, 0)),
        made(("b", "fa", 2, 1)),
        made(("c", "fa", 4, 1)),
    )
    assert shared_indices(first, second) == dict.fromkeys(SHAPES, 2)
    assert shared_indices(second, first) is shared_indices(first, second)
    assert shared_indices(first, third) == {}
    for _ in range(2):
        with pytest.raises(ConflictError, match="'a' and 'b' share 10 indices in 5 layers"):
            check_mergeable([first, second])
