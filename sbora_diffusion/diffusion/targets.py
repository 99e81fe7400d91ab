"""Which layers are adapted, and their canonical names.

A canonical name is diffusers' module path with the component in front; text encoder names always
have `text_model` inside, although transformers 5.6 and later print CLIPTextModel's without it.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

Targets = Literal["all", "unet", "cross-attention", "text-encoder"]
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Those with attention as CLIP has it; T5 is left as it is."""
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)

_CLIP = re.compile(r"\.self_attn\.(q|k|v|out)_proj$")
_TEXT = dict.fromkeys(TEXT_ENCODERS, _CLIP)
_DENOISER = {
    "unet": re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$"),
    "transformer": re.compile(r"\.attn2?\.(to_(q|k|v|out\.0)|add_[qkv]_proj|to_add_out)$"),
}
_READING = {  # in a transformer that attends to both at once, the layers of the text's tokens
    "unet": re.compile(r"\.attn2\.to_(q|k|v|out\.0)$"),
    "transformer": re.compile(r"\.attn\.(add_[qkv]_proj|to_add_out)$"),
}
_PATTERNS: dict[str, dict[str, re.Pattern[str]]] = {
    "all": {**_DENOISER, **_TEXT},
    "unet": _DENOISER,
    "cross-attention": _READING,
    "text-encoder": _TEXT,
}


def adaptable(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """The models of a pipeline that concepts change, by name: its denoiser, its CLIPs."""
    for component in COMPONENTS:
        if (model := getattr(pipeline, component, None)) is not None:
            yield component, model


def name_prefix(component: str, model: nn.Module) -> str:
    """What stands before a module's path in its canonical name."""
    flattened = component in TEXT_ENCODERS and not hasattr(model, "text_model")
    return f"{component}.text_model." if flattened else f"{component}."


def target_layers(pipeline: Any, targets: Targets = "all") -> dict[str, nn.Linear]:
    """Canonical name → linear layer, for the attention layers of denoiser and text encoders.

    Adapted layers are found too: the base layer is returned.
    """
    layers: dict[str, nn.Linear] = {}
    patterns = _PATTERNS[targets]
    for component, model in adaptable(pipeline):
        if component not in patterns:
            continue
        prefix = name_prefix(component, model)
        for path, module in model.named_modules():
            if patterns[component].search(path):
                layers[prefix + path] = getattr(module, "base_layer", module)
    return layers


def by_component(pipeline: Any, names: list[str]) -> dict[str, dict[str, str]]:
    """Split canonical names: component → {canonical name: module path}; empty ones left out."""
    split: dict[str, dict[str, str]] = {}
    for component, model in adaptable(pipeline):
        prefix = name_prefix(component, model)
        paths = {n: n.removeprefix(prefix) for n in sorted(names) if n.startswith(prefix)}
        if paths:
            split[component] = paths
    return split
