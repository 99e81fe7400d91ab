"""Generic prompts as the frozen base draws them, learned beside the subject."""

from weakref import WeakKeyDictionary

import pytest
import torch

from sbora_diffusion.diffusion import preservation
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.generic import PLACES, generic_prompts
from sbora_diffusion.diffusion.noise import Draw, Objective
from sbora_diffusion.diffusion.pipeline import ConceptPipeline
from sbora_diffusion.diffusion.preservation import Preserved, preserved_examples
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.evaluate import PROMPTS
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot

ROWS = 24


@pytest.fixture(scope="module", autouse=True)
def _few_pictures(pocket):
    """What holds for sixteen holds for eight, in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preservation, "PICTURES", 8)
        patch.setattr(preservation, "_KNOWN", WeakKeyDictionary())
        yield


@pytest.fixture(scope="module")
def preserved(pocket) -> Preserved:
    return preserved_examples(pocket, (pocket.resolution, pocket.resolution))


@torch.no_grad()
def mean_error(pocket, preserved: Preserved) -> float:
    """Of the first examples, as the model is now."""
    objective = Objective(pocket.pipeline.scheduler.config, 0.0, None)
    batch = objective.noised(Draw(*(part[:ROWS] for part in preserved.examples)))
    states, _ = pocket.pipeline.encode_prompt(
        list(preserved.captions[:ROWS]), pocket.device, 1, False
    )
    predicted = pocket.pipeline.unet(batch.noised, batch.timesteps, states).sample
    return objective.errors(predicted, batch).mean().item()


def trained(pocket, **settings):
    recipe = {"steps": 12, "warmup_steps": 0, "rate_unet": 1e-2, "batch_size": 2, "copies": 2}
    settings = {"preservation": 0.0} | settings
    training = ConceptTraining(
        pocket, read_subject(CONCEPTS / "plushbear"), TrainConfig(**recipe | settings), 0
    )
    try:
        for _ in training.steps():
            pass
        return training.concept()
    finally:
        training.close()


def error_with(pocket, concept, preserved: Preserved) -> float:
    attached = ConceptPipeline(pocket)
    attached.add(concept)
    try:
        return mean_error(pocket, preserved)
    finally:
        attached.remove(concept.meta.name)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_explained_prediction_is_the_target_of_the_same_noised_latents(prediction):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    objective = Objective(config | {"prediction_type": prediction}, 0.0, None)
    generator = torch.Generator().manual_seed(0)
    drawn = objective.draw(torch.randn(32, 4, 8, 8, generator=generator), generator)
    batch = objective.noised(drawn)
    predicted = torch.randn(batch.target.shape, generator=generator)
    latents, noise = objective.explained(batch, predicted)
    again = objective.noised(drawn._replace(latents=latents, noise=noise))
    torch.testing.assert_close(again.noised, batch.noised, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.target, predicted, rtol=0, atol=1e-4)


def test_the_bare_base_is_right_on_every_example(pocket, preserved):
    assert len(preserved.captions) == len(preserved.examples.latents) >= ROWS
    assert mean_error(pocket, preserved) < 1e-8
    assert preserved_examples(pocket, (pocket.resolution, pocket.resolution)) is preserved


def test_a_concept_that_learns_them_leaves_generic_prompts_nearer_to_the_base(pocket, preserved):
    before = snapshot(pocket)
    plain, mindful = (
        error_with(pocket, trained(pocket, preservation=weight, preservation_rows=4), preserved)
        for weight in (0.0, 10.0)
    )
    assert 0 < mindful < 0.7 * plain
    assert_untouched(pocket, before)


def test_the_loss_is_the_sum_of_both_means(pocket, preserved):
    """At first the factors are zero and the base is right: only the subject's own loss is left."""

    def first_loss(**settings) -> float:
        training = ConceptTraining(
            pocket,
            read_subject(CONCEPTS / "plushbear"),
            TrainConfig(steps=1, batch_size=2, copies=1, **{"preservation": 0.0} | settings),
            0,
        )
        try:
            return next(training.steps()).loss
        finally:
            training.close()

    plain = first_loss()
    assert first_loss(preservation=5.0, preservation_rows=3) == pytest.approx(plain, rel=1e-4)


def test_generic_prompts_are_the_same_for_a_seed_and_not_those_of_the_evaluation():
    prompts = generic_prompts(200, 0)
    assert prompts == generic_prompts(200, 0) != generic_prompts(200, 1)
    assert len(set(prompts)) > 150 and not any(set("<>{}") & set(prompt) for prompt in prompts)
    assert " an apple" in " ".join(prompts) and " a apple" not in " ".join(prompts)
    assert not any(place and place in prompt for place in PLACES for prompt in PROMPTS)


def test_pictures_of_another_resolution_get_generic_examples_of_theirs(pocket):
    size = pocket.resolution // 2
    settings = {"steps": 1, "batch_size": 1, "copies": 1, "preservation": 1.0, "resolution": size}
    training = ConceptTraining(
        pocket, read_subject(CONCEPTS / "plushbear"), TrainConfig(**settings), start=0
    )
    try:
        assert next(training.steps()).loss > 0
    finally:
        training.close()
    sizes = (size, size), (2 * size, 2 * size)
    small, own = (preserved_examples(pocket, s).examples.latents.shape for s in sizes)
    assert own[2:] == (2 * small[2], 2 * small[3])
