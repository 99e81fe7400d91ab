"""Placeholders with a vector for each cross-attention, against placeholders of one vector."""

import pytest
import torch

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.baselines.layerwise import Vocabulary, cross_attentions
from sbora_diffusion.diffusion.baselines.recipes import RANDOM_FIRST
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.baselines.quick import quick

PROMPTS = ["a photo of <two> and <one>", "a dog"]
ATTENTIONS = 4


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vocabulary(thin):
    vocabulary = Vocabulary(thin.pipeline)
    yield vocabulary
    vocabulary.set({})


def test_the_same_vector_for_every_layer_draws_what_one_vector_draws(thin, vocabulary):
    plain = {"<one>": random(2, 64, seed=1), "<two>": random(1, 64, seed=2)}
    vocabulary.set(plain)
    expected = draw_latents(thin, PROMPTS, [1, 2], 2, negative_prompt="a <one>")
    vocabulary.set({t: v[:, None].repeat(1, ATTENTIONS, 1) for t, v in plain.items()})
    got = draw_latents(thin, PROMPTS, [1, 2], 2, negative_prompt="a <one>")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_each_cross_attention_reads_the_states_of_its_own_vectors(thin, vocabulary):
    assert len(cross_attentions(thin.pipeline)) == ATTENTIONS
    vectors = {
        "<one>": random(2, ATTENTIONS, 64, seed=1),
        "<two>": random(1, ATTENTIONS, 64, seed=2),
    }
    expected = []
    for number in range(ATTENTIONS):
        vocabulary.set({token: v[:, number] for token, v in vectors.items()})
        expected.append(thin.pipeline.encode_prompt(PROMPTS, thin.device, 1, False)[0])
    vocabulary.set(vectors)
    seen = {}
    paths = [f"unet.{path}.to_k" for path in cross_attentions(thin.pipeline)]
    keys = {path: target_layers(thin.pipeline)[path] for path in paths}
    with watched(keys, lambda name, x: seen.update({name: x})):
        draw_latents(thin, PROMPTS, [1, 2], 1, guidance=1.0)
    for path, states in zip(paths, expected, strict=True):
        torch.testing.assert_close(seen[path], states, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1])


@pytest.mark.parametrize(
    "shapes", [((2, ATTENTIONS, 64), (2, 64)), ((2, ATTENTIONS + 1, 64), (2, ATTENTIONS + 1, 64))]
)
def test_placeholders_of_two_kinds_or_for_another_base_are_refused(vocabulary, shapes):
    one, two = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(FormatError, match="the base has 4"):
        vocabulary.set({"<one>": one, "<two>": two})


def test_first_vectors_start_at_random_and_the_others_from_the_class_noun(thin, subjects):
    method = METHODS["mix-of-show"]
    lessons = [Lesson(thin, s, quick(method), k) for k, s in enumerate(subjects)]
    training = method._open(thin, lessons)
    try:
        concepts = method._taken(training)
    finally:
        training.close()
    for lesson, concept in zip(lessons, concepts, strict=True):
        assert concept.vectors.shape == (2, ATTENTIONS, 64)
        first, second = (row.clone() for row in concept.vectors)
        assert torch.equal(second, lesson.initial["text_encoder"][1].expand(ATTENTIONS, -1))
        assert torch.equal(first, first[:1].expand(ATTENTIONS, -1))
        assert 0.75 * RANDOM_FIRST < first[0].std() / second[0].std() < 1.3 * RANDOM_FIRST
    assert not torch.equal(concepts[0].vectors[0], concepts[1].vectors[0])


def test_training_parts_the_layers_vectors_and_each_concept_learns_alone(thin, subjects):
    method = METHODS["mix-of-show"]
    config = quick(method, steps=2)
    both = method.train(thin, subjects, config)
    (alone,) = method.train(thin, subjects[1:], config, slots=[1])
    for concept in both:
        assert not torch.allclose(concept.vectors[:, 0], concept.vectors[:, 1])
    moved = (both[1].vectors - alone.vectors).norm()
    assert moved < 1e-2 * alone.vectors.norm()
