"""The recipes: what their sources say, whatever the project's default is."""

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.baselines.adapting import start_seed
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.tokens import word_vectors
from tests.diffusion.baselines.quick import quick

OTHERS = [name for name in METHODS if name != "sbora"]


@pytest.mark.parametrize("name", OTHERS)
def test_no_setting_is_left_to_the_default_of_the_project(name):
    config = METHODS[name].config
    assert config.model_fields_set == set(TrainConfig.model_fields)
    assert config.preservation == 0 and config.resolved_alpha == config.rank


def test_the_projects_own_row_follows_the_default():
    assert METHODS["sbora"].config == TrainConfig.model_validate({})


def test_rates_ranks_and_steps_are_the_published_ones():
    def of(name):
        config = METHODS[name].config
        rates = (config.rate_tokens, config.rate_text_encoder, config.rate_unet)
        return *rates, config.rank, config.steps, config.batch_size, config.vectors

    assert of("lora") == of("dora") == of("lora-fa") == (5e-4, 1e-5, 1e-4, 4, 1000, 4, None)
    assert of("orthogonal") == (1e-3, 0, 1e-5, 20, 1000, 4, 2)
    assert of("mix-of-show") == of("mix-of-show-plain") == (1e-3, 1e-5, 1e-4, 4, 1000, 4, 2)
    assert of("custom-diffusion") == (8e-5, 0, 8e-5, 1, 250, 4, 1)
    assert of("textual-inversion") == (2e-3, 0, 0, 1, 3000, 4, 1)
    assert METHODS["custom-diffusion"].config.prior_weight == 1
    priors = [name for name in OTHERS if METHODS[name].config.prior_weight]
    assert priors == ["custom-diffusion"]


def test_rows_and_columns_of_the_paper_differ_in_the_variant_and_one_rate():
    fa, fb = (METHODS[f"sbora-{name}"].config.model_dump() for name in ("fa", "fb"))
    assert {key for key in fa if fa[key] != fb[key]} == {"variant", "rate_unet"}
    for name in ("sbora-fa-same", "sbora-fa-random"):
        assert METHODS[name].config is METHODS["sbora-fa"].config


@pytest.mark.parametrize(
    ("name", "noun", "kept"),
    [
        ("textual-inversion", "birthday cake", ["cake"]),
        ("mix-of-show", "birthday cake", ["birthday", "cake"]),
        ("mix-of-show", "cake", ["cake", "cake"]),
        ("mix-of-show", "red birthday cake", ["birthday", "cake"]),
    ],
)
def test_fewer_vectors_than_the_class_noun_has_start_from_its_last_words(
    thin, subjects, name, noun, kept
):
    method = METHODS[name]
    settings = subjects[0].settings.model_copy(update={"class_noun": noun})
    subject = subjects[0].model_copy(update={"settings": settings})
    lesson = method._lesson(thin, subject, 0, quick(method))
    expected = torch.cat([word_vectors(thin.pipeline, word) for word in kept])
    assert torch.equal(lesson.initial["text_encoder"], expected)


@pytest.mark.parametrize("name", ["lora", "dora", "orthogonal", "custom-diffusion"])
def test_another_scale_than_one_is_refused(thin, subjects, name):
    method = METHODS[name]
    with pytest.raises(ConfigError, match="alpha is 7 at rank"):
        method.train(thin, subjects[:1], quick(method, alpha=7.0))


def test_each_slot_and_seed_starts_from_other_numbers_up_to_the_largest_seed(thin, subjects):
    config = quick(METHODS["lora"])
    largest = config.model_copy(update={"seed": (1 << 63) - 1})
    lessons = [Lesson(thin, subjects[0], c, slot) for c in (config, largest) for slot in (0, 1)]
    assert len({start_seed(lesson) for lesson in lessons}) == 4
