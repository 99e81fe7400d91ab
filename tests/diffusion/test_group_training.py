"""Concepts that train at once learn what each learns alone."""

import functools

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining, shared_settings
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot
from tests.diffusion.thin_pocket import thin_pocket

NAMES = ("toytrain", "baseballcap", "plushbear")  # not in the order of their tokens
QUICK = {
    "steps": 5, "batch_size": 2, "copies": 1, "resolution": 32, "warmup_steps": 2,
    "preservation": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def thin(pocket):
    return thin_pocket(pocket)


def subjects():
    return [read_subject(CONCEPTS / name) for name in NAMES]


def group(thin, *configs, starts=(0, 8, 8)) -> GroupTraining:
    zipped = zip(subjects(), configs, starts, strict=True)
    return GroupTraining(thin, [Lesson(thin, s, c, start) for s, c, start in zipped])


def alone(thin, subject, config, start):
    training = ConceptTraining(thin, subject, config, start)
    try:
        losses = [record.loss for record in training.steps()]
        return training.concept(), losses
    finally:
        training.close()


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-4 * expected.norm() > 0)


@pytest.fixture
def smooth_adam(monkeypatch):
    """With the usual ε of 1e-8, entries whose gradient is nearly 0 follow the rounding's sign."""
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.usefixtures("smooth_adam")
def test_three_concepts_of_two_ranks_learn_what_they_learn_alone(thin, variant):
    before = snapshot(thin)
    steps = 5 if variant == "fa" else 2
    config = TrainConfig(**QUICK | {"variant": variant, "steps": steps})
    configs = [config, config, config.model_copy(update={"rank": 4, "vectors": 3, "seed": 7})]
    training = group(thin, *configs)
    try:
        records = list(training.steps())
        concepts = training.concepts()
    finally:
        training.close()
    assert_untouched(thin, before)
    for k, (concept, subject) in enumerate(zip(concepts, subjects(), strict=True)):
        expected, losses = alone(thin, subject, configs[k], (0, 8, 8)[k])
        assert [record.losses[k] for record in records] == pytest.approx(losses, rel=1e-4)
        assert same_meta(concept, expected)
        for name, layer in expected.layers.items():
            assert torch.equal(concept.layers[name].indices, layer.indices)
        assert concept.layers.keys() == expected.layers.keys()
        assert close(flat(concept.layers), flat(expected.layers))
        for token, vectors in expected.embeddings.items():
            assert close(concept.embeddings[token], vectors)


def same_meta(concept, expected) -> bool:
    documents = [c.meta.model_dump(exclude={"digest"}) for c in (concept, expected)]
    return documents[0] == documents[1]


def flat(layers) -> torch.Tensor:
    return torch.cat([layers[name].factor.flatten() for name in sorted(layers)])


def test_accumulation_checkpointing_prior_and_bf16_train_and_give_the_base_back(thin, monkeypatch):
    from sbora_diffusion.diffusion import lesson, pipeline

    monkeypatch.setattr(
        lesson, "draw", lambda base, prompts, seeds: pipeline.draw(base, prompts, seeds, 1)
    )
    before = snapshot(thin)
    config = TrainConfig(
        **QUICK | {"steps": 1, "batch_size": 1, "targets": "text-encoder", "prior_images": 1},
        gradient_accumulation=2, gradient_checkpointing=True, prior_weight=0.5,
        mixed_precision="bf16",
    )  # fmt: skip
    training = group(thin, config, config, config)
    try:
        (record,) = training.steps()
        assert len(record.losses) == 3 and record.loss == pytest.approx(sum(record.losses) / 3)
        assert all(flat(concept.layers).any() for concept in training.concepts())
    finally:
        training.close()
    assert_untouched(thin, before)
    assert not any(isinstance(part, RemovableHandle) for part in leftovers(thin))


def leftovers(base):
    """What the text encoder's modules hold beside tensors and modules."""
    for module in base.pipeline.text_encoder.modules():
        for value in vars(module).values():
            yield from value if isinstance(value, list | tuple) else (value,)


def test_an_interrupted_group_gives_the_base_back(thin, monkeypatch):
    before = snapshot(thin)
    config = TrainConfig(**QUICK)
    training = group(thin, config, config, config)
    monkeypatch.setattr(training, "_clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(training.steps())
    training.close()
    assert_untouched(thin, before)
    assert all(not m._forward_hooks for m in thin.pipeline.unet.modules())


def interrupt(*_):
    raise KeyboardInterrupt


def test_recipes_that_cannot_be_shared_are_refused(thin):
    config = TrainConfig(**QUICK)
    assert shared_settings(config) == shared_settings(config.model_copy(update={"rank": 2}))
    for other in ({"steps": 6}, {"variant": "fb"}, {"batch_size": 1}, {"rate_unet": 1.0}):
        with pytest.raises(ConfigError, match="cannot train at once"):
            group(thin, config, config, config.model_copy(update=other))
    for alone_only in ({"dropout": 0.1}, {"mixed_precision": "fp16"}):
        assert shared_settings(config.model_copy(update=alone_only)) is None


def test_one_subject_twice_and_captions_that_name_another_are_refused(thin, tmp_path):
    first, second, _ = subjects()
    config = TrainConfig(**QUICK)
    one, other = Lesson(thin, first, config, 0), Lesson(thin, second, config, 8)
    with pytest.raises(ConflictError, match="two subjects have the name"):
        GroupTraining(thin, [one, one])
    example = other.examples[0]
    caption = f"{second.settings.token} with {first.settings.token}"
    other.examples[0] = type(example)(example.pixels, (caption,))
    with pytest.raises(ConflictError, match="a caption of"):
        GroupTraining(thin, [one, other])
