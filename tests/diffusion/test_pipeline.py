"""Concepts as live adapters: they come and go without a trace."""

import numpy as np
import pytest
import torch

from sbora_diffusion.core.concept import Concept, LayerFactor, read_concept
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, FormatError
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents, generate
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

pytestmark = pytest.mark.usefixtures("small_pictures")

PROMPT = "a photo of <plushbear> on grass"


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory):
    """Three concepts of both variants with large random factors."""
    folder = tmp_path_factory.mktemp("strong")
    kinds = {"one": ("fa", 0), "two": ("fa", 1), "three": ("fb", 0)}
    return {n: strong_concept(pocket, folder, n, v, s) for n, (v, s) in kinds.items()}


@pytest.fixture
def live(pocket, original):
    """A pipeline of concepts; afterwards the base must be as it was."""
    concepts = ConceptPipeline(pocket)
    yield concepts
    for name in list(concepts.concepts):
        concepts.remove(name)
    assert_untouched(pocket, original)


def latents(pocket, prompt: str = "a <one> and a <two>", seed: int = 0) -> torch.Tensor:
    return draw_latents(pocket, [prompt], [seed], steps=2)


def test_adding_and_removing_leaves_bytes_and_pictures_of_the_base(pocket, original, live, strong):
    before = latents(pocket)
    for name in ("one", "three", "two"):
        assert live.add(strong[name]) is False
    assert not torch.allclose(latents(pocket), before, atol=1e-2)
    for name in ("three", "one", "two"):
        live.remove(name)
    assert_untouched(pocket, original)
    assert torch.equal(latents(pocket), before)


def test_removing_one_concept_leaves_the_pictures_of_the_other(pocket, live, strong):
    live.add(strong["two"])
    alone = latents(pocket)
    live.add(strong["one"])
    live.remove("one")
    assert torch.equal(latents(pocket), alone)


def test_concepts_that_were_trained_can_be_attached(pocket, live, tiny_concepts):
    for path in tiny_concepts.values():
        live.add(read_concept(path))
    (picture,) = live.generate(PROMPT, steps=2)
    assert picture.size == (64, 64) and picture.mode == "RGB"


def test_weight_zero_is_the_base_and_weights_can_be_changed(pocket, live, strong):
    prompt = "a photo of a bear"  # without the token, whose embedding has no weight
    before = latents(pocket, prompt)
    live.add(strong["one"], weight=0.0)
    assert torch.equal(latents(pocket, prompt), before)
    live.set_weight("one", 1.0)
    full = latents(pocket, prompt)
    live.set_weight("one", 0.5)
    half = latents(pocket, prompt)
    assert (full - before).abs().max() > (half - before).abs().max() > 1e-2
    live.set_weight("one", 0.0)
    assert torch.equal(latents(pocket, prompt), before)


def test_the_order_of_attaching_changes_no_byte(pocket, live, strong):
    live.add(strong["one"])
    live.add(strong["two"])
    first = latents(pocket)
    live.remove("one")
    live.add(strong["one"])
    assert torch.equal(latents(pocket), first)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(pocket):
    first, again, other = (
        np.asarray(generate(pocket, "a red car", seed=seed, steps=2)[0]) for seed in (5, 5, 6)
    )
    assert (first == again).all() and (first != other).any()


def test_picture_k_depends_on_seed_plus_k_and_not_on_the_number(pocket):
    three = [np.asarray(picture, int) for picture in generate(pocket, "a cat", num=3, steps=2)]
    for k, picture in enumerate(three):
        (alone,) = generate(pocket, "a cat", seed=k, steps=2)
        # Kernels round differently for other batch sizes: a grey level at most.
        assert np.abs(np.asarray(alone, int) - picture).max() <= 1
    assert np.abs(three[0] - three[1]).max() > 10


def test_progress_counts_to_the_end_over_all_pictures(pocket):
    calls = []
    generate(pocket, "a cat", num=5, steps=2, on_step=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("values", [{"num": 0}, {"steps": 0}, {"steps": 1001}])
def test_numbers_out_of_range_are_refused(pocket, values):
    with pytest.raises(ConfigError):
        generate(pocket, "a cat", **values)


def test_a_concept_of_another_base_is_refused_and_nothing_changes(pocket, live, tmp_path):
    layer, digits = next(iter(pocket.fingerprint.items()))
    other = {**pocket.fingerprint, layer: "0" * 48}
    assert digits != "0" * 48
    with pytest.raises(BaseMismatch, match="1 of 72"):
        live.add(strong_concept(pocket, tmp_path, "alien", fingerprint=other))


def test_a_name_a_token_or_an_index_in_use_is_refused(pocket, live, strong, tmp_path):
    live.add(strong["one"])
    with pytest.raises(ConflictError, match="name 'one'"):
        live.add(strong["one"])
    token = {"tokens": strong["one"].meta.tokens}
    thief = strong["two"].meta.model_copy(update=token)
    renamed = {"text_encoder.<one>": strong["two"].embeddings["text_encoder.<two>"]}
    with pytest.raises(ConflictError, match="token '<one>'"):
        live.add(Concept(thief, strong["two"].layers, renamed))
    double = strong_concept(pocket, tmp_path, "double", slot=0)
    with pytest.raises(ConflictError, match="share 576 indices in 72 layers"):
        live.add(double)
    assert list(live.concepts) == ["one"]
    live.add(double, allow_overlap=True)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(live, strong, weight):
    with pytest.raises(ConfigError, match="finite"):
        live.add(strong["one"], weight)
    live.add(strong["one"])
    with pytest.raises(ConfigError, match="finite"):
        live.set_weight("one", weight)


def test_unknown_names_are_refused_and_the_attached_ones_listed(live, strong):
    live.add(strong["one"])
    for act in (live.remove, lambda name: live.set_weight(name, 1.0)):
        with pytest.raises(ConflictError, match=r"'nobody' is attached; attached are \['one'\]"):
            act("nobody")


@pytest.mark.parametrize("name", ["train", "double", "forward", "keys"])
def test_a_concept_may_be_called_like_an_attribute_of_a_torch_module(pocket, live, tmp_path, name):
    live.add(strong_concept(pocket, tmp_path, name))
    live.set_weight(name, 0.5)
    live.remove(name)


def test_a_factor_or_an_embedding_of_another_shape_is_refused(pocket, original, live, strong):
    concept = strong["one"]
    layer = min(concept.layers)
    wrong = LayerFactor(concept.layers[layer].indices, concept.layers[layer].factor[:1])
    with pytest.raises(FormatError, match=r"has shape \(1, 8\)"):
        live.add(Concept(concept.meta, {**concept.layers, layer: wrong}, concept.embeddings))
    narrow = {"text_encoder.<one>": torch.zeros(2, 16)}
    with pytest.raises(FormatError, match="<one> is 16 wide, the base's words are 192"):
        live.add(Concept(concept.meta, concept.layers, narrow))
    assert_untouched(pocket, original)
    live.add(concept)


def test_concepts_that_a_prompt_does_not_mention_are_named(live, strong):
    live.add(strong["one"])
    live.add(strong["two"])
    assert live.unmentioned("a <two> on grass") == ["one"]
    assert live.unmentioned("one and two") == ["one", "two"]
    assert live.unmentioned("<one><two>") == []
