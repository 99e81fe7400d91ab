"""Which layers are adapted, and that their names do not depend on the installed transformers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sbora_diffusion.diffusion.targets import by_component, name_prefix, target_layers

COUNTS = {"all": 72, "unet": 56, "cross-attention": 28, "text-encoder": 16}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(4, 4))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.self_attn = Attention()
        self.layer.mlp = nn.Linear(4, 4)


def both_namings() -> list[nn.Module]:
    """A text encoder as transformers printed it up to 5.5, and as it prints it since."""
    nested = nn.Module()
    nested.text_model = Inner()
    return [nested, Inner()]


def test_pocket_has_72_adapted_layers_of_width_160_or_more(pocket):
    layers = target_layers(pocket.pipeline)
    assert len(layers) == 72
    assert all(isinstance(layer, nn.Linear) for layer in layers.values())
    assert min(min(layer.weight.shape) for layer in layers.values()) >= 160


@pytest.mark.parametrize(("targets", "count"), COUNTS.items())
def test_each_choice_of_targets_has_its_layers(pocket, targets, count):
    layers = target_layers(pocket.pipeline, targets)
    assert len(layers) == count and layers.items() <= target_layers(pocket.pipeline).items()
    if targets == "cross-attention":
        assert all(".attn2." in name for name in layers)


def test_names_have_text_model_inside_whatever_transformers_prints():
    expected = {f"text_encoder.text_model.layer.self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    for encoder in both_namings():
        pipeline = SimpleNamespace(unet=nn.Module(), text_encoder=encoder)
        assert target_layers(pipeline).keys() == expected
        assert all(
            encoder.get_submodule(path) is target_layers(pipeline)[name]
            for name, path in by_component(pipeline, list(expected))["text_encoder"].items()
        )


def test_pocket_names_are_canonical_and_lead_back_to_the_modules(pocket):
    layers = target_layers(pocket.pipeline)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in layers
    split = by_component(pocket.pipeline, list(layers))
    assert {part: len(paths) for part, paths in split.items()} == {"unet": 56, "text_encoder": 16}
    for part, paths in split.items():
        model = getattr(pocket.pipeline, part)
        assert all(model.get_submodule(path) is layers[name] for name, path in paths.items())


def test_a_component_without_names_is_left_out(pocket):
    names = list(target_layers(pocket.pipeline, "unet"))
    assert by_component(pocket.pipeline, names).keys() == {"unet"}
    assert by_component(pocket.pipeline, []) == {}


def test_wrapped_layers_are_found_as_their_base_layers():
    encoder = Inner()
    plain = encoder.layer.self_attn.q_proj
    wrapper = nn.Module()
    wrapper.base_layer, wrapper.factor = plain, nn.Parameter(torch.zeros(1))
    encoder.layer.self_attn.q_proj = wrapper
    found = target_layers(SimpleNamespace(unet=nn.Module(), text_encoder=encoder))
    assert found["text_encoder.text_model.layer.self_attn.q_proj"] is plain and len(found) == 4


def test_the_prefix_of_the_unet_is_its_own_name(pocket):
    assert name_prefix("unet", pocket.pipeline.unet) == "unet."
