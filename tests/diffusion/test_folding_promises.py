"""What folding promises, on the pocket base and on Stable Diffusion 1.5's shapes: any order, any
detour and any removal give the same bytes, in every file of a model folder too."""

import hashlib
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from sbora_diffusion.bench.standin import standin, standin_concept
from sbora_diffusion.core.concept import Concept, sealed
from sbora_diffusion.core.folded_set import FoldedSet, Weighted
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.diffusion.test_merging import hashes, merge_and_save, outside, tensors
from tests.diffusion.thin_sd15 import thin_sd15

EIGHT = [
    *(("a", "fa", 0), ("b", "fa", 1), ("c", "fa", 2), ("d", "fa", 19), ("e", "fa", 4)),
    *(("f", "fb", 0), ("g", "fb", 1), ("h", "fb", 19)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Layers = dict[str, nn.Linear]


@pytest.fixture(scope="module")
def thin(pocket) -> Base:
    return thin_sd15(pocket)


@pytest.fixture(scope="module")
def pocket_concepts(pocket, tmp_path_factory) -> list[Weighted]:
    return eight(pocket, tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="module")
def thin_concepts(thin, tmp_path_factory) -> list[Weighted]:
    return eight(thin, tmp_path_factory.mktemp("thin"))


def eight(base: Base, folder: Path) -> list[Weighted]:
    return [
        (strong_concept(base, folder, name, variant, slot, vectors=1 + k % 3), 0.5 + k / 8)
        for k, (name, variant, slot) in enumerate(EIGHT)
    ]


@pytest.fixture(scope="module")
def sd15() -> tuple[Layers, list[Weighted]]:
    """One layer of each shape that Stable Diffusion 1.5's attention has, and eight concepts."""
    shapes: dict[tuple[str, torch.Size], tuple[str, nn.Linear]] = {}
    for name, layer in target_layers(standin(torch.Generator().manual_seed(0))).items():
        shapes.setdefault((name.split(".")[0], layer.weight.shape), (name, layer))
    layers = dict(shapes.values())
    assert {max(layer.weight.shape) for layer in layers.values()} == {320, 640, 768, 1280}
    return layers, [(standin_concept(layers, *kind), 0.7) for kind in EIGHT]


def in_type(layers: Layers, dtype: torch.dtype) -> Layers:
    """Copies, whose weights are rounded to that type."""
    copies = {}
    for name, layer in layers.items():
        copies[name] = nn.Linear(layer.in_features, layer.out_features, bias=False)
        copies[name].weight = nn.Parameter(layer.weight.detach().clone().to(dtype), False)
    return copies


def digest(*values: torch.Tensor) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def digest_of(layers: Layers) -> str:
    return digest(*(layers[name].weight for name in sorted(layers)))


@pytest.fixture(params=["pocket", "sd15"])
def folding(request) -> tuple[Layers, list[Weighted]]:
    """Attention layers of the pocket base, every third for speed, or Stable Diffusion 1.5's."""
    if request.param == "sd15":
        return request.getfixturevalue("sd15")
    layers = target_layers(request.getfixturevalue("pocket").pipeline)
    names = sorted(layers)[::3]
    concepts = request.getfixturevalue("pocket_concepts")
    return {name: layers[name] for name in names}, [(on_layers(c, names), w) for c, w in concepts]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forty_orders_of_eight_concepts_and_any_removal_give_the_same_bytes(folding, dtype):
    layers, concepts = in_type(folding[0], dtype), folding[1]
    rng, folded, base = random.Random(0), FoldedSet(layers), digest_of(layers)
    merged = set()
    for _ in range(40):
        folded.switch(rng.sample(concepts, 8))
        merged.add(digest_of(layers))
        folded.switch([])
    assert len(merged) == 1 and merged != {base} == {digest_of(layers)}
    for count in (7, 4, 1):
        rest = rng.sample(concepts, count)
        folded.switch(concepts)
        for k in range(7, count - 1, -1):  # taken out one by one
            folded.switch([*rest, *(pair for pair in concepts if pair not in rest)][:k])
        removed = digest_of(layers)
        folded.switch([])
        folded.switch(rest)
        assert removed == digest_of(layers)
    folded.switch([])
    assert digest_of(layers) == base


def operations(rng: random.Random, concepts: list[Weighted], count: int):
    """`count` sets, each reached by adding, removing, changing a weight, or removing all."""
    current: dict[int, float] = {}
    for _ in range(count):
        k, chance = rng.randrange(len(concepts)), rng.random()
        if chance < 0.02:
            current.clear()
        elif chance < 0.4 and current:
            del current[rng.choice(list(current))]
        else:
            current[k] = rng.choice([-0.5, 1.0])
        yield [(concepts[k][0], weight) for k, weight in current.items()]


def key(pairs: list[Weighted]) -> frozenset[tuple[str, float]]:
    return frozenset((concept.meta.name, weight) for concept, weight in pairs)


def on_layers(concept: Concept, names: list[str]) -> Concept:
    """A concept that adapts some of its layers alone."""
    meta = concept.meta
    few = {
        field: {name: getattr(meta, field)[name] for name in names}
        for field in ("fingerprint", "widths")
    }
    layers = {name: concept.layers[name] for name in names}
    return sealed(Concept(meta.model_copy(update=few), layers, concept.embeddings))


def test_a_thousand_operations_on_the_pocket_equal_a_fresh_build_each_time(
    pocket, pocket_concepts, record_property
):
    """Weights, word embeddings and vocabulary; of concepts on every ninth layer, for speed."""
    pipeline, before = pocket.pipeline, snapshot(pocket)
    layers = target_layers(pipeline)
    names = sorted(layers)[::9]
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    concepts = [(on_layers(c, names), 1.0) for c, _ in pocket_concepts[3:7]]

    def state() -> tuple[str, tuple[str, ...]]:
        words = pipeline.text_encoder.get_input_embeddings().weight
        added = tuple(sorted(pipeline.tokenizer.get_added_vocab()))
        return digest(words, *(layers[name].weight for name in names)), added

    def fresh(pairs: list[Weighted]) -> tuple[str, tuple[str, ...]]:
        built = Merged(pocket, pairs)
        try:
            return state()
        finally:
            built.restore()

    sets = list(operations(random.Random(1), concepts, 1000))
    expected = {
        key(pairs): fresh(pairs) for pairs in {key(pairs): pairs for pairs in sets}.values()
    }
    assert len(expected) > 50 and len(set(expected.values())) == len(expected)
    held = Merged(pocket)
    for pairs in sets:
        held.switch(pairs)
        assert state() == expected[key(pairs)]
    held.restore()
    assert_untouched(pocket, before)
    record_property("21 operations switched", len(sets))


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.reliability)])
def test_random_operations_in_the_shapes_of_sd15_equal_a_fresh_build_each_time(
    sd15, count, record_property
):
    layers = in_type(sd15[0], torch.bfloat16)
    folded, sets = FoldedSet(layers), list(operations(random.Random(2), sd15[1][3:7], count))
    expected = {}
    for pairs in {key(pairs): pairs for pairs in sets}.values():
        folded.switch(pairs)
        expected[key(pairs)] = digest_of(layers)
        folded.switch([])
    assert len(expected) > 50 and len(set(expected.values())) == len(expected)
    for pairs in sets:
        folded.switch(pairs)
        assert digest_of(layers) == expected[key(pairs)]
    record_property("21 operations switched", count)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(["pocket"], DTYPES), ("thin", torch.float32)],
    ids=str,
)
def test_every_file_of_the_folder_keeps_the_promises(request, tmp_path, name, dtype):
    """Removal gives the folder of merging the rest, without concepts the base's own; outside the
    owned rows and columns every tensor of every file is the base's."""
    base, concepts = request.getfixturevalue(name), request.getfixturevalue(f"{name}_concepts")
    rest = concepts[2:7]
    held = Merged(base)
    try:
        held.save(tmp_path / "base", dtype)
        held.switch(concepts)
        for concept, _ in (concepts[0], concepts[7], concepts[1]):
            held.remove(concept.meta.name)
        held.save(tmp_path / "removed", dtype)
        held.restore()
        held.save(tmp_path / "after", dtype)
    finally:
        held.restore()
    merge_and_save(base, tmp_path / "rest", rest[::-1], dtype)
    found = {path.name: hashes(path) for path in tmp_path.iterdir()}
    assert found["removed"] == found["rest"] and found["after"] == found["base"]
    assert len(found["base"]) >= 10 and found["removed"] != found["base"]
    own, now = tensors(tmp_path / "base"), tensors(tmp_path / "removed")
    assert own.keys() == now.keys()
    changed = {key for key, value in now.items() if not torch.equal(value, own[key])}
    words = "text_encoder.embeddings.token_embedding"
    assert {plain(name) for name in changed} == {f"{n}.weight" for n in map(plain, owned(rest))} | {
        f"{words}.weight"
    }
    for name, value in now.items():
        layer = next((n for n in owned(rest) if plain(name) == f"{plain(n)}.weight"), None)
        if layer:
            free = outside([concept for concept, _ in rest], layer, value.shape)
            assert torch.equal(value[free], own[name][free])
        elif plain(name) == f"{words}.weight":
            assert torch.equal(value[: len(own[name])], own[name])


def plain(name: str) -> str:
    """Text encoders' names with and without this part are in use for the same tensors."""
    return name.replace("text_model.", "")


def owned(concepts: list[Weighted]) -> list[str]:
    return list(concepts[0][0].layers)
