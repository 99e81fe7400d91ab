"""Which layers are adapted, and their canonical names.

A canonical name is diffusers' module path with the component in front; text encoder names always
have `text_model` inside, although transformers 5.6 and later print CLIPTextModel's without it.
"""

import re
from typing import Literal

from diffusers import StableDiffusionPipeline
from torch import nn

Targets = Literal["all", "unet", "cross-attention", "text-encoder"]
COMPONENTS = ("unet", "text_encoder")

_UNET = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
_CROSS_ATTENTION = re.compile(r"\.attn2\.to_(q|k|v|out\.0)$")
_TEXT_ENCODER = re.compile(r"\.self_attn\.(q|k|v|out)_proj$")
_PATTERNS: dict[str, dict[str, re.Pattern[str]]] = {
    "all": {"unet": _UNET, "text_encoder": _TEXT_ENCODER},
    "unet": {"unet": _UNET},
    "cross-attention": {"unet": _CROSS_ATTENTION},
    "text-encoder": {"text_encoder": _TEXT_ENCODER},
}


def name_prefix(component: str, model: nn.Module) -> str:
    """What stands before a module's path in its canonical name."""
    flattened = component == "text_encoder" and not hasattr(model, "text_model")
    return f"{component}.text_model." if flattened else f"{component}."


def target_layers(
    pipeline: StableDiffusionPipeline, targets: Targets = "all"
) -> dict[str, nn.Linear]:
    """Canonical name → linear layer, for the attention layers of UNet and text encoder.

    Adapted layers are found too: the base layer is returned.
    """
    layers: dict[str, nn.Linear] = {}
    for component, pattern in _PATTERNS[targets].items():
        model = getattr(pipeline, component)
        prefix = name_prefix(component, model)
        for path, module in model.named_modules():
            if pattern.search(path):
                layers[prefix + path] = getattr(module, "base_layer", module)
    return layers


def by_component(pipeline: StableDiffusionPipeline, names: list[str]) -> dict[str, dict[str, str]]:
    """Split canonical names: component → {canonical name: module path}; empty ones left out."""
    split: dict[str, dict[str, str]] = {}
    for component in COMPONENTS:
        prefix = name_prefix(component, getattr(pipeline, component))
        paths = {n: n.removeprefix(prefix) for n in sorted(names) if n.startswith(prefix)}
        if paths:
            split[component] = paths
    return split
