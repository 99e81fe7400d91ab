"""Many layers in the folded form at once, for the length of a training."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from sbora_diffusion.core.rewriting import Rewriting
from sbora_diffusion.core.tuner.folded import Obstacle, begin_folded, end_folded, write_back
from sbora_diffusion.core.tuner.layer import SboraLinear


@dataclass(frozen=True)
class FoldedTraining:
    """One adapter in training.

    Attributes:
        layers: name → layer, those in the folded form.
        obstacles: name → why a layer takes two paths instead.
    """

    layers: Mapping[str, SboraLinear]
    obstacles: Mapping[str, Obstacle]
    _rewriting: Rewriting = field(default_factory=Rewriting, repr=False, compare=False)

    def write_back(self) -> None:
        """Rewrite the trained columns or rows; to be called after each optimizer step."""
        write_back(self.layers.values(), self._rewriting)


@contextmanager
def folded_training(layers: Mapping[str, nn.Module], adapter: str) -> Iterator[FoldedTraining]:
    """Put an adapter's layers into the folded form, each where it can be, and take them out again.

    However the block is left, every base weight has its own bytes again afterwards. A model saved
    inside the block would hold folded weights; its adapters' state does not differ.

    Args:
        layers: name → layer; those of other kinds than `SboraLinear` are left as they are.

    Raises:
        NonFiniteError: a factor is not finite.
    """
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, SboraLinear)}
    shares = Counter(id(layer.weight) for layer in ours.values())
    obstacles = {name: Obstacle.ABSENT for name in layers if name not in ours}
    try:
        for name, layer in ours.items():
            shared = shares[id(layer.weight)] > 1
            obstacle = Obstacle.SHARED if shared else begin_folded(layer, adapter)
            if obstacle is not None:
                obstacles[name] = obstacle
        folded = {name: layer for name, layer in ours.items() if name not in obstacles}
        yield FoldedTraining(folded, obstacles)
    finally:
        for layer in ours.values():
            end_folded(layer)
