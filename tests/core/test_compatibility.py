import dataclasses

import pytest

from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import BaseMismatch, ConflictError
from tests.core.concept_examples import SHAPES, make_base, make_concept


def renamed(concept: Concept, name: str) -> Concept:
    meta = concept.meta.model_copy(update={"name": name})
    return dataclasses.replace(concept, meta=meta)


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_concepts_of_different_slots_may_be_merged(variant):
    names = ("robot", "dog", "cat")
    concepts = [make_concept(n, variant, slot=s) for s, n in enumerate(names)]
    assert check_mergeable(concepts) == "same"


def test_ranks_side_by_side_may_be_merged():
    concepts = [make_concept("robot", rank=8), make_concept("dog", rank=4, slot=2)]
    assert check_mergeable(concepts) == "same"


def test_none_or_one_concept_never_conflicts():
    assert check_mergeable([]) == check_mergeable([make_concept()]) == "same"


def test_an_overlap_names_concepts_indices_layers_and_the_first_layer():
    concepts = [
        make_concept("robot", rank=4, slot=1),
        make_concept("cat", rank=4, slot=0),
        make_concept("dog", rank=8, slot=0),
    ]
    with pytest.raises(ConflictError) as caught:
        check_mergeable(concepts)
    message = str(caught.value)
    for part in ("'cat' and 'dog'", "12 indices in 3 layers", repr(min(SHAPES))):
        assert part in message
    assert check_mergeable(concepts, allow_overlap=True) == "same"


def test_overlap_is_told_from_the_indices_and_not_from_the_slots():
    first, second = make_concept("robot"), make_concept("dog", slot=1)
    layer = max(SHAPES)
    stolen = dataclasses.replace(second.layers[layer], indices=first.layers[layer].indices)
    second = dataclasses.replace(second, layers={**second.layers, layer: stolen})
    with pytest.raises(ConflictError, match=f"4 indices in 1 layers, the first is '{layer}'"):
        check_mergeable([first, second])


def test_the_two_variants_are_not_compared_with_each_other():
    assert check_mergeable([make_concept("robot", "fa"), make_concept("dog", "fb")]) == "same"


def test_a_name_or_token_used_twice_is_a_conflict_even_when_overlap_is_allowed():
    first = make_concept("robot")
    with pytest.raises(ConflictError, match="name 'robot'"):
        check_mergeable([first, renamed(make_concept("dog", slot=1), "robot")], True)
    with pytest.raises(ConflictError, match="token '<robot>'"):
        check_mergeable([first, renamed(make_concept("robot", slot=1), "dog")], True)


def test_concepts_of_different_bases_are_refused_by_name_and_layer():
    other = make_concept("dog", slot=1, base=make_base(seed=1))
    with pytest.raises(BaseMismatch, match=r"'robot' and 'dog'.*3 of 3.*text_encoder"):
        check_mergeable([make_concept("robot"), other], allow_overlap=True)


def test_concepts_of_different_families_are_refused():
    with pytest.raises(BaseMismatch, match="'pocket' and 'sd1'"):
        check_mergeable([make_concept("robot"), make_concept("dog", slot=1, family="sd1")])


def test_a_concept_of_a_rounded_copy_is_accepted_and_reported():
    rounded = {name: weight.half() for name, weight in make_base().items()}
    concepts = [make_concept("robot"), make_concept("dog", slot=1, base=rounded)]
    assert check_mergeable(concepts) == "rounded"


def test_concepts_on_different_layers_of_one_base_may_be_merged():
    text = {name: shape for name, shape in SHAPES.items() if name.startswith("text")}
    unet = {name: shape for name, shape in SHAPES.items() if name.startswith("unet")}
    base = make_base()
    concepts = [
        make_concept("robot", shapes=text, base={name: base[name] for name in text}),
        make_concept("dog", shapes=unet, base={name: base[name] for name in unet}),
    ]
    assert check_mergeable(concepts) == "same"
