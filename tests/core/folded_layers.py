"""Adapted layers with a frozen base, in the folded form or not."""

from sbora_diffusion.core.tuner import SboraLinear
from sbora_diffusion.core.tuner.folded import begin_folded
from tests.core.tuner_models import make


def frozen(*slots: int, **options) -> SboraLinear:
    """`make` with a base that takes no gradient."""
    layer = make(*slots, **options)
    layer.base_layer.requires_grad_(False)
    return layer


def folded(*slots: int, **options) -> SboraLinear:
    """A frozen layer with its first adapter in the base weight."""
    layer = frozen(*slots, **options)
    assert begin_folded(layer, "s0") is None
    return layer
