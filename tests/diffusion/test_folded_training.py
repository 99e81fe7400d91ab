"""A whole training in the folded form: the two-path form's numbers, and the base comes back."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sbora_diffusion.core.recalled import Recall
from sbora_diffusion.core.tuner.folded import Obstacle
from sbora_diffusion.core.tuner.folded_training import FoldedTraining
from sbora_diffusion.diffusion import training as module
from sbora_diffusion.diffusion.adapters import adapter_name
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot

pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


@contextmanager
def opened(pocket, **settings):
    defaults = {"batch_size": 1, "copies": 1, "warmup_steps": 0, "resolution": 32}
    config = TrainConfig(**(defaults | {"schedule": "constant", "preservation": 0.0} | settings))
    training = ConceptTraining(pocket, read_subject(CONCEPTS / "plushbear"), config, 0)
    try:
        yield training
    finally:
        training.close()


@contextmanager
def two_paths(layers, adapter):
    """In place of `folded_training`: no layer in the folded form."""
    yield FoldedTraining({}, {})


def collected_gradients(training) -> list[Tensor]:
    """Each step's gradient as it reaches the clipping, flattened."""
    collected: list[Tensor] = []
    clip = training.accelerator.clip_grad_norm_

    def keep(parameters, norm):
        collected.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, norm)

    training.accelerator.clip_grad_norm_ = keep
    return collected


def trained(pocket, **settings) -> tuple[list[float], list[Tensor], int]:
    """(losses, gradients, how many layers were folded)."""
    with opened(pocket, **settings) as training:
        gradients = collected_gradients(training)
        steps = training.steps()
        losses = [next(steps).loss]
        folded = len(training.folded.layers)
        losses += [record.loss for record in steps]
    return losses, gradients, folded


@pytest.mark.parametrize(("variant", "batches"), [("fa", 2), ("fb", 1)])
def test_losses_and_gradients_are_those_of_the_two_path_form(
    pocket, original, variant, batches, monkeypatch
):
    settings = {
        "variant": variant,
        "steps": 2,
        "gradient_accumulation": 2 if variant == "fa" else 1,
    }
    losses, gradients, folded = trained(pocket, **settings)
    monkeypatch.setattr(module, "folded_training", two_paths)
    expected_losses, expected, none = trained(pocket, **settings)
    assert (folded, none) == (72, 0) and len(gradients) == len(expected) == 2
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm() > 0
    assert_untouched(pocket, original)


def test_recalling_layer_norms_changes_no_bit_of_fbs_training(pocket, original, monkeypatch):
    recalled, output = [], Recall.output
    monkeypatch.setattr(Recall, "output", lambda *args: (recalled.append(1), output(*args))[1])
    losses, gradients, _ = trained(pocket, variant="fb", steps=2)
    count = len(recalled)
    monkeypatch.setattr(module, "plain_norms", lambda _model: [])
    expected_losses, expected, _ = trained(pocket, variant="fb", steps=2)
    assert count == len(recalled) > 2 * 24
    assert losses == expected_losses and all(map(torch.equal, gradients, expected))
    assert_untouched(pocket, original)


def test_between_the_steps_no_layer_norm_has_a_hook(pocket):
    with opened(pocket, variant="fb", steps=2) as training:
        for _ in training.steps():
            modules = [*pocket.pipeline.unet.modules(), *pocket.pipeline.text_encoder.modules()]
            assert training._norms and not any(module._forward_hooks for module in modules)


@torch.no_grad()
def denoised(pocket) -> Tensor:
    """What drawing sees: text encoder and UNet on small latents, without gradients."""
    pipeline, generator = pocket.pipeline, torch.Generator().manual_seed(0)
    ids = pipeline.tokenizer("a photo of a toy", return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    return pipeline.unet(latents, torch.tensor([500]), pipeline.text_encoder(ids)[0]).sample


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_pictures_between_the_steps_are_those_of_the_merged_model(pocket, original, variant):
    with opened(pocket, variant=variant, steps=2) as training:
        steps = training.steps()
        next(steps)
        weights = {name: layer.weight.clone() for name, layer in training.adapted.items()}
        latents, concept = denoised(pocket), training.concept()
    merged = Merged(pocket, [(concept, 1.0)])
    try:
        layers = target_layers(pocket.pipeline)
        assert all(torch.equal(layers[name].weight, w) for name, w in weights.items())
        assert torch.equal(denoised(pocket), latents)
    finally:
        merged.restore()
    assert_untouched(pocket, original)


def base_is_back(original, training) -> bool:
    return all(
        any(torch.equal(layer.weight, value) for value in candidates(original, layer.weight))
        for layer in training.adapted.values()
    )


def candidates(original, weight: Tensor) -> list[Tensor]:
    return [value for value in original.values() if value.shape == weight.shape]


@pytest.mark.parametrize("way", ["finished", "abandoned", "interrupted", "closed"])
def test_however_the_steps_end_the_weights_are_the_bases_again(pocket, original, way, monkeypatch):
    with opened(pocket, steps=2) as training:
        steps = training.steps()
        next(steps)
        assert not base_is_back(original, training)
        if way == "finished":
            list(steps)
        elif way == "abandoned":
            steps.close()
        elif way == "interrupted":
            monkeypatch.setattr(training, "_losses", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(steps)
        else:
            training.close()
            assert_untouched(pocket, original)
            steps.close()
        assert base_is_back(original, training)
    assert_untouched(pocket, original)


def interrupt(*_):
    raise KeyboardInterrupt


def test_adapters_disabled_between_two_steps_give_the_base_back_and_training_goes_on(
    pocket, original
):
    with opened(pocket, steps=2) as training:
        steps = training.steps()
        next(steps)
        trained = [layer.weight.clone() for layer in training.adapted.values()]
        for layer in training.adapted.values():
            layer.enable_adapters(False)
        assert base_is_back(original, training)
        for layer in training.adapted.values():
            layer.enable_adapters(True)
        again = [layer.weight for layer in training.adapted.values()]
        assert all(map(torch.equal, again, trained))
        assert math.isfinite(next(steps).loss)
        assert not any(map(torch.equal, again, trained))
    assert_untouched(pocket, original)


def test_with_dropout_the_layers_take_two_paths_and_say_why(pocket, original):
    with opened(pocket, steps=1, dropout=0.5, targets="text-encoder") as training:
        steps = training.steps()
        assert math.isfinite(next(steps).loss)
        obstacles = training.folded.obstacles
        assert set(obstacles) == set(training.adapted)
        assert set(obstacles.values()) == {Obstacle.DROPOUT} and not training.folded.layers
        assert base_is_back(original, training)
    assert_untouched(pocket, original)


def test_gradient_checkpointing_in_the_folded_form_gives_the_same_factors(pocket, original):
    results = []
    for checkpointing in (False, True):
        with opened(pocket, steps=1, gradient_checkpointing=checkpointing) as training:
            list(training.steps())
            name = adapter_name(training.subject.settings.name)
            factors = [layer.sbora_factor[name] for layer in training.adapted.values()]
            results.append(torch.cat([factor.detach().flatten() for factor in factors]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert results[0].count_nonzero() > 0
    assert_untouched(pocket, original)
