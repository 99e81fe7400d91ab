"""Canonical layer names: what kind of layer a name stands for, and which layer sets the capacity.

Names are diffusers' module paths, e.g. ``unet.mid_block.attentions.0.…attn2.to_k`` and
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``.
"""

import re
from collections.abc import Mapping

from sbora_diffusion.core.errors import ConfigError

OTHER = "other layers"

_KINDS = (
    (re.compile(r"^text_encoder(_\d+)?\."), "text encoder"),
    (re.compile(r"\.attn1\."), "self-attention"),
    (re.compile(r"\.attn2\."), "cross-attention"),
)
_PROJECTION = re.compile(r"\.(?:to_)?(q|k|v|out)(?:_proj|\.0)?$")


def narrowest(widths: Mapping[str, int]) -> str:
    """The layer that sets the capacity: the narrowest one, of several the first by name.

    Raises:
        ConfigError: no layers are given.
    """
    if not widths:
        raise ConfigError("no layer is adapted", "choose targets that match the base model")
    return min(widths, key=lambda layer: (widths[layer], layer))


def kind(layer: str) -> str:
    """ "text encoder", "self-attention", "cross-attention" (both of the UNet) or `OTHER`."""
    return next((name for pattern, name in _KINDS if pattern.search(layer)), OTHER)


def role(layer: str) -> str:
    """The kind with the projection: "cross-attention k"; the kind alone where there is none."""
    projection = _PROJECTION.search(layer)
    return f"{kind(layer)} {projection[1]}" if projection else kind(layer)
