"""Peers with dense factors, ΔW = B A: many concepts in one training, and their sum in one model.

Ordinary LoRA (Hu et al. 2021, arXiv 2106.09685) trains both factors. Orthogonal Adaptation (Po et
al. 2023, arXiv 2312.02432) freezes A: rows of a random orthogonal basis that all concepts share,
other rows for each, so that the As of any two are orthogonal. Loop, targets, captions and
placeholders are SBoRA's.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens
from sbora_diffusion.diffusion.training_loop import TrainingLoop


@dataclass(frozen=True, eq=False)
class Dense:
    """A trained concept, on the CPU.

    Attributes:
        factors: canonical name of the layer → down (r, in) and up (out, r).
        vectors: (vectors, dim) of the placeholder token.
    """

    token: str
    factors: dict[str, tuple[Tensor, Tensor]]
    vectors: Tensor


class DenseTraining(GroupTraining):
    """A group of concepts with dense factors and alpha = rank; read them with `dense()`.

    What the recipe says of variants is without meaning here; a lesson's range says which rows of
    the basis its concept has.

    Args:
        orthogonal: whether down factors are frozen rows of the shared basis.
    """

    def __init__(self, base: Base, lessons: Sequence[Lesson], orthogonal: bool):
        self._orthogonal = orthogonal
        super().__init__(base, lessons)

    def _put_in(self) -> None:
        device, rank = self.base.device, self.config.rank
        start = _basis_rows if self._orthogonal else _Kaiming()
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, nn.Parameter] = {}
        for name, layer in self.lessons[0].layers.items():
            rows = [start(lesson, name, layer.in_features) for lesson in self.lessons]
            down = torch.stack(rows).to(device)
            self.down[name] = down if self._orthogonal else nn.Parameter(down)
            zeros = torch.zeros(len(self.lessons), layer.out_features, rank, device=device)
            self.up[name] = nn.Parameter(zeros)

    def _factors(self, component: str) -> list[nn.Parameter]:
        return [
            factor
            for factors in (self.down, self.up)
            for name, factor in factors.items()
            if name.startswith(component) and isinstance(factor, nn.Parameter)
        ]

    def _train_mode(self, on: bool) -> None:
        TrainingLoop._train_mode(self, on)
        self._hooks.close()
        if on:
            for name, layer in self.lessons[0].layers.items():
                hook = partial(_added, self.down[name], self.up[name])
                self._hooks.callback(layer.register_forward_hook(hook).remove)

    def dense(self) -> list[Dense]:
        """The concepts in the order of the lessons."""
        owners = self._owners()
        return [
            Dense(
                lesson.subject.settings.token,
                {n: (_copied(self.down[n][k]), _copied(self.up[n][k])) for n in self.up},
                _copied(self.trainable.vectors[owners == k]),
            )
            for k, lesson in enumerate(self.lessons)
        ]


class DenseModel:
    """A base with concepts in its weights, W0 + Σ λ B A in fp32.

    While concepts are in, nothing else may change the base's weights or tokens.

    Args:
        base: unadapted; `restore` gives it back bit for bit.
    """

    def __init__(self, base: Base):
        self._layers = target_layers(base.pipeline)
        self._own = {n: layer.weight.detach().clone() for n, layer in self._layers.items()}
        self._tokens = PlaceholderTokens(base.pipeline)

    @torch.no_grad()
    def switch(self, concepts: Sequence[tuple[Dense, float]]) -> None:
        """Make exactly these concepts, with their weights λ, the ones in the model."""
        self._tokens.set({concept.token: concept.vectors for concept, _ in concepts})
        for name, layer in self._layers.items():
            own = self._own[name]
            layer.weight.copy_(own + _update(concepts, name, own) if concepts else own)

    def restore(self) -> None:
        """Put the base's own bytes and vocabulary back."""
        self.switch([])


def basis(layer: str, width: int, seed: int) -> Tensor:
    """A random orthogonal matrix (width, width), fp32, of a layer: the same for all concepts."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # uniform, whatever signs the factorization prefers


def _basis_rows(lesson: Lesson, layer: str, width: int) -> Tensor:
    config, start = lesson.config, lesson.start
    return basis(layer, width, config.allocation_seed)[start : start + config.rank]


class _Kaiming:
    """LoRA's usual start of A, another one for each concept."""

    def __init__(self) -> None:
        self._generators: dict[Lesson, Generator] = {}

    def __call__(self, lesson: Lesson, layer: str, width: int) -> Tensor:
        seed = (lesson.config.seed << 16) + lesson.start
        generator = self._generators.setdefault(lesson, Generator().manual_seed(seed))
        down = torch.empty(lesson.config.rank, width)
        return nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


def _added(down: Tensor, up: Tensor, _layer: nn.Module, inputs: tuple[Any, ...], y: Tensor):
    """Each concept's update on its own rows, which stand together in the batch."""
    (x,) = inputs
    rows = x.reshape(len(down), -1, x.shape[-1])
    return y + (rows @ down.mT @ up.mT).view(y.shape)


def _update(concepts: Sequence[tuple[Dense, float]], layer: str, like: Tensor) -> Tensor:
    """Σ λ B A, (out, in), as one product."""
    ups = [weight * concept.factors[layer][1] for concept, weight in concepts]
    downs = [concept.factors[layer][0] for concept, _ in concepts]
    return torch.cat(ups, 1).to(like.device) @ torch.cat(downs).to(like.device)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
