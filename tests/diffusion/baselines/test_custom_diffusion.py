"""Custom Diffusion's closed-form merge, against the equations it solves."""

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.baselines.custom_diffusion import (
    READS_TEXT,
    ConstrainedConfig,
    closest,
    constrained,
    features,
    token_ids,
)
from sbora_diffusion.diffusion.baselines.edited import add_up
from sbora_diffusion.diffusion.baselines.recipes import RANDOM_FIRST
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import word_vectors
from tests.diffusion.baselines.quick import quick, random_concept

FEW = ConstrainedConfig(captions=60, prompts=("a photo of {}",))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_closed_form_solves_the_equations_of_lagrange():
    own, ordinary, words = random(4, 6), random(20, 6, seed=1), random(2, 6, seed=2)
    wanted = random(2, 4, seed=3)
    energy = ordinary.T @ ordinary
    system = torch.cat(
        [torch.cat([2 * energy, words.T], 1), torch.cat([words, torch.zeros(2, 2)], 1)]
    )
    right = torch.cat([2 * energy @ own.T, wanted])
    expected = torch.linalg.solve(system, right)[:6].T
    torch.testing.assert_close(closest(own, ordinary, words, wanted), expected)


def test_nothing_changes_where_the_words_get_what_the_base_gives():
    own, words = random(4, 6), random(2, 6, seed=2)
    torch.testing.assert_close(closest(own, random(9, 6), words, words @ own.T), own)


@pytest.mark.parametrize(
    ("ordinary", "words", "problem"),
    [
        (random(9, 6), random(7, 6), "7 words to hold"),
        (torch.zeros(9, 6), random(2, 6), "linearly"),
        (random(9, 6), torch.zeros(2, 6), "linearly"),
    ],
)
def test_equations_without_a_solution_are_refused(ordinary, words, problem):
    with pytest.raises(ConfigError, match=problem):
        closest(random(4, 6), ordinary, words, torch.zeros(len(words), 4))


def test_a_prompts_features_run_from_the_token_to_the_texts_end(thin):
    concept = random_concept(thin, "one", "words")
    with add_up(thin, [(concept, 1.0)]):
        prompt = "a photo of <one>"
        ids = token_ids(thin, prompt)
        first = ids.index(thin.pipeline.tokenizer.convert_tokens_to_ids("<one>"))
        rows = features(thin, [prompt], first)
        assert len(rows) == 2 + 1 and ids[-1] == thin.pipeline.tokenizer.eos_token_id
        states = thin.pipeline.text_encoder(torch.tensor([ids]))[0][0]
        torch.testing.assert_close(rows.float(), states[-3:], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def pair(thin):
    return [random_concept(thin, name, "full", vectors=1) for name in ("one", "two")]


def test_each_concepts_words_get_its_own_keys_and_values_and_ordinary_ones_change_less(thin, pair):
    layers = target_layers(thin.pipeline)
    own = {name: layer.weight.detach().double() for name, layer in layers.items()}
    captions = generic_prompts(60, FEW.seed)
    ordinary = features(thin, captions, 1)
    with constrained(thin, [(pair[0], 1.0), (pair[1], 0.5)], FEW):
        now = {name: layer.weight.detach().double() for name, layer in layers.items()}
        words = {token: features(thin, [f"a photo of {token}"], 4) for token in ("<one>", "<two>")}
        for name, weight in now.items():
            if not READS_TEXT.search(name):
                assert torch.equal(weight, own[name])
                continue
            for concept, share in zip(pair, (1.0, 0.5), strict=True):
                rows, update = words[concept.meta.token], concept.layers[name]["delta"].double()
                expected = rows @ (own[name] + share * update).T
                torch.testing.assert_close(rows @ weight.T, expected, rtol=0, atol=1e-4)
            summed = pair[0].layers[name]["delta"] + 0.5 * pair[1].layers[name]["delta"]
            drift = (ordinary @ (weight - own[name]).T).norm()
            assert drift < 0.5 * (ordinary @ summed.double().T).norm()


def test_too_many_words_leave_the_base_as_it_was(thin, pair):
    many = ConstrainedConfig(captions=60, prompts=("{}",) * 40)
    with pytest.raises(ConfigError, match="words to hold"):
        constrained(thin, [(concept, 1.0) for concept in pair], many)


def test_one_word_before_the_class_noun_is_trained_and_the_noun_is_kept(thin, subjects):
    method = METHODS["custom-diffusion"]
    for noun in ("train", "birthday cake"):
        settings = subjects[0].settings.model_copy(update={"class_noun": noun})
        subject = subjects[0].model_copy(update={"settings": settings})
        (concept,) = method.train(thin, [subject], quick(method, steps=2))
        kept = word_vectors(thin.pipeline, noun)
        assert torch.equal(concept.vectors[1:], kept) and len(kept) == len(noun.split())
        assert method.trainable(concept).tokens == kept.shape[1]


def test_the_new_word_moves_from_a_random_start_as_long_as_a_word(thin, subjects):
    method = METHODS["custom-diffusion"]
    config = quick(method, steps=2)
    (concept,) = method.train(thin, subjects[:1], config)
    (still,) = method.train(thin, subjects[:1], config.model_copy(update={"rate_tokens": 0.0}))
    first, noun = still.vectors[:2]
    assert 0.7 * RANDOM_FIRST < first.std() / noun.std() < 1.3 * RANDOM_FIRST
    assert not torch.equal(concept.vectors[0], first)
    assert torch.equal(concept.vectors[1:], still.vectors[1:])
