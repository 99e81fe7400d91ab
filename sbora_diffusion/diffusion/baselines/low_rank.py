"""Updates of low rank, ΔW = B A: LoRA, LoRA-FA, Orthogonal Adaptation and DoRA.

LoRA (Hu et al. 2021, arXiv 2106.09685) trains both factors; LoRA-FA (Zhang et al. 2023, arXiv
2308.03303) freezes a random A; Orthogonal Adaptation (Po et al. 2023, arXiv 2312.02432) freezes A
too: rows of a random orthogonal basis that all concepts share, other rows for each, so that the As
of any two are orthogonal. (Its authors draw the rows at random, so that two concepts share some now
and then; rows by slot are what they approach.) DoRA (Liu et al. 2024, arXiv 2402.09353) trains both
factors and each output row's length. The scale is alpha / rank = 1 in all.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from sbora_diffusion.diffusion.baselines.adapted import Form
from sbora_diffusion.diffusion.baselines.adapting import AdaptedTraining, start_seed
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.lesson import Lesson

Down = Literal["trained", "frozen", "basis"]


class LowRankTraining(AdaptedTraining):
    """Concepts with factors of their recipe's rank.

    Args:
        down: the down factors: trained or frozen, from LoRA's usual start; or frozen rows of the
            shared basis, those of the lesson's range.
    """

    form: Form = "low-rank"

    def __init__(
        self,
        base: Base,
        lessons: Sequence[Lesson],
        method: str = "lora",
        layerwise: bool = False,
        random_first: float = 0.0,
        down: Down = "trained",
    ):
        self._down, self._starts = down, {lesson: _Kaiming(lesson) for lesson in lessons}
        super().__init__(base, lessons, method, layerwise, random_first)

    def _start(self, name: str, layer: nn.Linear) -> Mapping[str, Tensor]:
        device, rank = self.base.device, self.config.rank
        down = self._rows(name, layer.in_features).to(device)
        up = torch.zeros(len(self.lessons), layer.out_features, rank, device=device)
        trained = self._down == "trained"
        return {"down": nn.Parameter(down) if trained else down, "up": nn.Parameter(up)}

    def _rows(self, name: str, width: int) -> Tensor:
        """The down factors at the start, (concepts, r, width)."""
        if self._down == "basis":
            return basis_rows(self.lessons, name, width)
        return torch.stack([self._starts[lesson](width) for lesson in self.lessons])

    def _act(self, layer: nn.Linear, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + x @ parts["down"].mT @ parts["up"].mT


class MagnitudeTraining(LowRankTraining):
    """DoRA: y = (m / ‖W0 + B A‖) (W0 + B A) x, row by row, the norm taken as a constant (Section
    4.3); the magnitudes m start as ‖W0‖."""

    form: Form = "magnitude"

    def _start(self, name: str, layer: nn.Linear) -> Mapping[str, Tensor]:
        norms = layer.weight.detach().float().norm(dim=1)
        magnitude = norms.repeat(len(self.lessons), 1)
        return {**super()._start(name, layer), "magnitude": nn.Parameter(magnitude)}

    def _act(self, layer: nn.Linear, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        bias = 0.0 if layer.bias is None else layer.bias
        share = parts["magnitude"] / row_norms(layer.weight, parts["down"], parts["up"])
        product = super()._act(layer, parts, x, y - bias)
        return (product * share[:, None]).to(product.dtype) + bias


@torch.no_grad()
def row_norms(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """‖W0 + B A‖ of each output row, (concepts, out), fp32, without making the sums.

    Args:
        weight: W0, (out, in).
        down, up: (concepts, r, in) and (concepts, out, r).
    """
    with torch.autocast(weight.device.type, enabled=False):
        own, down, up = weight.float(), down.float(), up.float()
        mixed = (up * (own @ down.mT)).sum(2)
        added = (up @ (down @ down.mT) * up).sum(2)
        return (own.square().sum(1) + 2 * mixed + added).clamp_min(1e-30).sqrt()


def basis(layer: str, width: int, seed: int) -> Tensor:
    """A random orthogonal matrix (width, width), fp32, of a layer: the same for all concepts."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # uniform, whatever signs the factorization prefers


def basis_rows(lessons: Sequence[Lesson], layer: str, width: int) -> Tensor:
    """The rows of the basis that the lessons' ranges own, (lessons, r, width)."""
    seeds = {lesson.config.allocation_seed for lesson in lessons}
    whole = {seed: basis(layer, width, seed) for seed in seeds}  # each takes a second at 1280
    rows = [whole[x.config.allocation_seed][x.start : x.start + x.config.rank] for x in lessons]
    return torch.stack(rows)


class _Kaiming:
    """LoRA's usual start of A, drawn layer after layer."""

    def __init__(self, lesson: Lesson) -> None:
        self._rank = lesson.config.rank
        self._generator = Generator().manual_seed(start_seed(lesson))

    def __call__(self, width: int) -> Tensor:
        down = torch.empty(self._rank, width)
        return nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=self._generator)
