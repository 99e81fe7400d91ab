"""Training changes what it should, nothing else, and gives the base back."""

import dataclasses
import functools
import math

import pytest
import torch
from safetensors.torch import save_file

from sbora_diffusion.core.concept import write_concept
from sbora_diffusion.core.errors import CapacityError, ConfigError, NonFiniteError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import Example
from sbora_diffusion.diffusion.lesson import initial_vectors
from sbora_diffusion.diffusion.pipeline import draw, draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import word_vectors
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot

pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


def open_training(pocket, start: int = 0, **settings) -> ConceptTraining:
    quick = {"steps": 1, "batch_size": 1, "copies": 1, "warmup_steps": 0, "preservation": 0.0}
    config = quick | settings
    return ConceptTraining(
        pocket, read_subject(CONCEPTS / "plushbear"), TrainConfig(**config), start
    )


def train(pocket, start: int = 0, **settings):
    """(concept, records) of a whole training."""
    training = open_training(pocket, start, **settings)
    try:
        records = list(training.steps())
        return training.concept(), records
    finally:
        training.close()


def factors(concept) -> torch.Tensor:
    return torch.cat([concept.layers[name].factor.flatten() for name in sorted(concept.layers)])


@pytest.fixture(scope="module")
def plain(pocket):
    """What one step without options gives."""
    return factors(train(pocket)[0])


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_72_of_72_layers_train_and_nothing_else_changes(pocket, original, variant):
    training = open_training(pocket, variant=variant, steps=2, schedule="constant")
    try:
        records = list(training.steps())
        concept = training.concept()
        trainable = [
            parameter
            for model in (pocket.pipeline.unet, pocket.pipeline.text_encoder)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        bases = target_layers(pocket.pipeline)
        changed = [
            name
            for name, layer in bases.items()
            if not torch.equal(layer.weight, weight_of(original, name))
        ]
    finally:
        training.close()
    assert len(concept.layers) == 72 and len(trainable) == 73 and changed == []
    assert all(layer.factor.count_nonzero() for layer in concept.layers.values())
    assert [r.step for r in records] == [1, 2] and all(math.isfinite(r.loss) for r in records)
    assert_untouched(pocket, original)


def weight_of(state, name):
    nested = name in {key.removesuffix(".weight") for key in state}
    path = name if nested else name.replace("text_encoder.text_model.", "text_encoder.")
    return state[f"{path}.weight"]


def test_training_leaves_the_models_on_their_device(pocket, monkeypatch):
    """Accelerate would take them to the first GPU, whichever one they were loaded to."""
    moved = []
    for model in (pocket.pipeline.unet, pocket.pipeline.text_encoder):
        monkeypatch.setattr(model, "to", lambda *where: moved.append(where))
    train(pocket)
    assert moved == []


def test_the_same_seed_gives_the_same_file_and_another_seed_another(pocket, original, tmp_path):
    contents = []
    for number, seed in enumerate((3, 3, 4)):
        concept, _ = train(pocket, seed=seed)
        write_concept(tmp_path / f"{number}", concept)
        contents.append((tmp_path / f"{number}").read_bytes())
        torch.rand(number + 1)  # the global random state must not matter
    assert contents[0] == contents[1] != contents[2]
    assert_untouched(pocket, original)


@pytest.mark.parametrize(
    ("targets", "count"), [("unet", 56), ("cross-attention", 28), ("text-encoder", 16)]
)
def test_each_choice_of_targets_trains_its_layers(pocket, original, targets, count):
    concept, _ = train(pocket, targets=targets, schedule="constant")
    assert len(concept.layers) == count
    assert all(layer.factor.count_nonzero() for layer in concept.layers.values())
    assert_untouched(pocket, original)


def test_dropout_acts_in_training_but_not_on_pictures_between_the_steps(pocket, original, plain):
    training = open_training(pocket, dropout=0.5)
    try:
        next(training.steps())
        assert not torch.equal(factors(training.concept()), plain)
        first, second = (draw_latents(pocket, ["a <plushbear>"], [0], 1) for _ in range(2))
        assert torch.equal(first, second)
    finally:
        training.close()
    assert_untouched(pocket, original)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_snr_gamma": 5.0},
        {"noise_offset": 0.1},
        {"prior_weight": 1.0, "prior_images": 1},
        {"seed": 2**40 + 1},
        {"vectors": 3},
        {"resolution": 96},
        {"gradient_accumulation": 2},
    ],
    ids=str,
)
def test_options_change_the_result_and_leave_the_base(
    pocket, original, plain, settings, monkeypatch
):
    quick = functools.partial(draw, steps=1)
    monkeypatch.setattr("sbora_diffusion.diffusion.lesson.draw", quick)
    concept, records = train(pocket, **settings)
    assert not torch.equal(factors(concept), plain) and math.isfinite(records[0].loss)
    assert_untouched(pocket, original)


def test_gradient_checkpointing_gives_the_same_factors_and_is_switched_off_again(
    pocket, original, plain
):
    checkpointed, _ = train(pocket, gradient_checkpointing=True)
    torch.testing.assert_close(factors(checkpointed), plain, rtol=0, atol=1e-5)
    assert not pocket.pipeline.unet.is_gradient_checkpointing
    assert not pocket.pipeline.text_encoder.is_gradient_checkpointing
    assert_untouched(pocket, original)


def test_mixed_precision_ends_with_the_training(pocket, original):
    before = draw_latents(pocket, ["a bear"], [0], 1)
    concept, records = train(pocket, mixed_precision="bf16")
    assert math.isfinite(records[0].loss) and factors(concept).dtype == torch.float32
    assert torch.equal(draw_latents(pocket, ["a bear"], [0], 1), before)
    assert_untouched(pocket, original)


def test_accumulated_gradients_are_the_mean_of_the_single_ones(pocket):
    """With the loss of each half weighted equally, one step on two halves is one on the whole."""
    gradients = []
    for accumulation in (1, 2):
        training = open_training(pocket, gradient_accumulation=accumulation, max_gradient_norm=1e9)
        draws = iter([fixed_noise(0), fixed_noise(1)])
        collected = record_gradients(training)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if accumulation == 1:
                    patch.setattr(training, "_losses", both_halves(training, draws))
                else:
                    patch.setattr(training, "_losses", one_half(training, draws))
                list(training.steps())
            gradients.append(collected[-1])
        finally:
            training.close()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def fixed_noise(seed):
    return torch.Generator().manual_seed(seed)


def one_half(training, draws):
    plain = ConceptTraining._losses

    def losses(models, objective, _):
        ((stream,),) = [lesson.streams() for lesson in training.lessons]
        again = dataclasses.replace(stream, generator=next(draws))
        return plain(training, models, objective, training._batch(objective, [again]))

    return losses


def both_halves(training, draws):
    half = one_half(training, draws)
    return lambda *inputs: (half(*inputs) + half(*inputs)) / 2


def record_gradients(training) -> list[torch.Tensor]:
    """Keeps each gradient that reaches the clipping, flattened."""
    collected = []
    clip = training.accelerator.clip_grad_norm_

    def keep(parameters, norm):
        collected.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, norm)

    training.accelerator.clip_grad_norm_ = keep
    return collected


def test_a_loss_that_is_no_number_stops_and_the_base_comes_back(pocket, original):
    training = open_training(pocket)
    broken = torch.full_like(training.lesson.examples[0].pixels, float("nan"))
    training.lesson.examples = [Example(broken, ("a <plushbear>",))]
    try:
        with pytest.raises(NonFiniteError, match="loss became nan at step 1; lower rate_unet"):
            list(training.steps())
    finally:
        training.close()
    assert_untouched(pocket, original)
    assert not pocket.pipeline.unet.training and not pocket.pipeline.text_encoder.training


def test_an_abandoned_training_can_be_closed_twice(pocket, original):
    training = open_training(pocket, steps=5)
    next(training.steps())
    training.close()
    training.close()
    assert_untouched(pocket, original)


def test_a_range_beyond_capacity_is_refused_before_anything_changes(pocket, original):
    with pytest.raises(CapacityError, match="160 wide and holds 20"):
        open_training(pocket, start=160)
    assert_untouched(pocket, original)


@pytest.mark.parametrize(
    "rates", [{"rate_unet": 0, "rate_tokens": 0, "rate_text_encoder": 0}], ids=["all zero"]
)
def test_nothing_to_train_is_refused(pocket, original, rates):
    with pytest.raises(ConfigError, match="learning rates are 0"):
        train(pocket, **rates)
    assert_untouched(pocket, original)


def test_a_rate_of_zero_keeps_its_part_at_the_start(pocket):
    concept, _ = train(pocket, rate_text_encoder=0, rate_tokens=0)
    for name, layer in concept.layers.items():
        assert bool(layer.factor.count_nonzero()) == name.startswith("unet.")


def test_infinite_settings_are_refused():
    with pytest.raises(ValueError):
        TrainConfig(max_gradient_norm=math.inf)


def test_the_rate_warms_up_and_falls_as_a_cosine(pocket):
    training = open_training(pocket, steps=20, warmup_steps=4, schedule="cosine")
    try:
        rates = [training._rate(step) for step in range(20)]
    finally:
        training.close()
    expected = [
        min(1.0, (step + 1) / 4) * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)
    ]
    assert rates == pytest.approx(expected) and rates[0] == 0.25 and 0 < rates[-1] < 0.01


def test_records_tell_the_rate_that_the_step_used(pocket):
    _, records = train(pocket, steps=3, warmup_steps=4, schedule="constant", targets="text-encoder")
    assert [record.rate for record in records] == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize(("variant", "share"), [("fa", 0.53), ("fb", 0.55)])
def test_a_concept_file_is_about_half_a_lora_of_its_rank(pocket, tmp_path, variant, share):
    training = open_training(pocket, variant=variant)
    try:
        concept = training.concept()
    finally:
        training.close()
    write_concept(tmp_path / "sbora", concept)
    lora = {}
    for name, layer in target_layers(pocket.pipeline).items():
        lora[f"{name}.lora_A.weight"] = torch.zeros(8, layer.in_features)
        lora[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, 8)
    save_file(lora, tmp_path / "lora")
    tokens = sum(v.numel() * v.element_size() for v in concept.embeddings.values())
    size = (tmp_path / "sbora").stat().st_size - tokens
    assert size <= share * (tmp_path / "lora").stat().st_size


@pytest.mark.parametrize(
    ("noun", "settings", "count"),
    [
        ("cat", {}, 4),
        ("a very small wooden train", {}, 6),  # one vector for each of its tokens
        ("cat " * 12, {}, 8),
        ("cat", {"vectors": 1}, 1),
        ("a very small wooden train", {"vectors": 2}, 2),
    ],
)
def test_a_placeholder_starts_as_the_class_noun_with_at_least_four_vectors(
    pocket, noun, settings, count
):
    own = word_vectors(pocket.pipeline, noun)
    initial = initial_vectors(pocket, noun, TrainConfig(**settings).vectors)
    assert len(initial) == count
    repeated = torch.cat([own, own[-1:].expand(16, -1)])[:count]
    assert torch.equal(initial, repeated)
