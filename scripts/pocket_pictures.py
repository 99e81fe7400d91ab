"""Recent pictures on the training device, and what the judge must see through in them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

UNTOUCHED = 0.25  # share of pictures that are not resampled
BLUR_RATE, SHRINK_RATE, NOISE_RATE = 0.3, 0.2, 0.4


class PicturePool:
    """The last `size` pictures as bytes, each drawn several times before it is replaced.

    Composing costs about as much as a training step; the reuse makes it cheap.
    """

    def __init__(
        self, stream: Iterable[tuple[Tensor, Tensor]], size: int, generator: Generator
    ) -> None:
        self.batches, self.size, self.generator = iter(stream), size, generator
        pictures, ids = next(self.batches)
        self.pictures = torch.empty(
            size, *pictures.shape[1:], dtype=torch.uint8, device=pictures.device
        )
        self.ids = torch.empty(size, ids.shape[1], dtype=torch.long, device=ids.device)
        self.filled = self.cursor = 0
        self._keep(pictures, ids)

    def refresh(self) -> None:
        self._keep(*next(self.batches))

    def _keep(self, pictures: Tensor, ids: Tensor) -> None:
        stop = min(self.cursor + len(ids), self.size)
        rows, count = slice(self.cursor, stop), stop - self.cursor
        self.pictures[rows] = to_bytes(pictures[:count])
        self.ids[rows] = ids[:count]
        self.filled = max(self.filled, stop)
        self.cursor = stop % self.size

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Different pictures, altered, (B, 3, H, W) in [−1, 1], and their ids (B, L)."""
        order = torch.randperm(self.filled, generator=self.generator, device=self.ids.device)
        rows = order[:batch]
        return augment(from_bytes(self.pictures[rows]), self.generator), self.ids[rows]


def to_bytes(pictures: Tensor) -> Tensor:
    return (pictures * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def augment(pictures: Tensor, generator: Generator) -> Tensor:
    """Crop, recolour, soften and roughen (B, 3, H, W) in [−1, 1]; never mirrored.

    Captions name left and right. Softness and noise are there because the judge is to look at
    generated pictures, having learnt from composed ones.
    """
    pictures = _soften(_recolour(_crop(pictures, generator), generator), generator)
    noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
    return (pictures + 0.1 * _sometimes(len(pictures), NOISE_RATE, generator) * noise).clamp(-1, 1)


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """One number a picture, (B, 1, 1, 1)."""
    drawn = torch.rand(count, 1, 1, 1, generator=generator, device=generator.device)
    return low + (high - low) * drawn


def _sometimes(count: int, rate: float, generator: Generator) -> Tensor:
    """A strength in 0..1 for a share `rate` of the pictures, 0 for the others, (B, 1, 1, 1)."""
    drawn = _uniform(count, 0, 1, generator) < rate
    return drawn * _uniform(count, 0, 1, generator)


def _crop(pictures: Tensor, generator: Generator) -> Tensor:
    """A window of 85 to 100 % of the picture's sides, resized to all of it."""
    count = len(pictures)
    window = _uniform(count, 0.85, 1, generator)
    window = torch.where(_uniform(count, 0, 1, generator) < UNTOUCHED, 1.0, window).flatten()
    theta = torch.zeros(count, 2, 3, device=pictures.device)
    for axis in range(2):
        theta[:, axis, axis] = window
        theta[:, axis, 2] = (1 - window) * _uniform(count, -1, 1, generator).flatten()
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def _recolour(pictures: Tensor, generator: Generator) -> Tensor:
    """Brightness ±0.12, contrast and saturation ±20 %, each channel ±5 %."""
    count = len(pictures)
    grey = pictures.mean(1, keepdim=True)
    pictures = torch.lerp(grey, pictures, _uniform(count, 0.8, 1.2, generator))
    middle = grey.mean((2, 3), keepdim=True)
    pictures = torch.lerp(middle, pictures, _uniform(count, 0.8, 1.2, generator))
    gains = torch.rand(count, 3, 1, 1, generator=generator, device=pictures.device)
    return pictures * (0.95 + 0.1 * gains) + _uniform(count, -0.12, 0.12, generator)


def _soften(pictures: Tensor, generator: Generator) -> Tensor:
    """A Gaussian blur (σ 1.3 pixels) and a way through half the size, each for some pictures."""
    count = len(pictures)
    pictures = torch.lerp(pictures, _blur(pictures), _sometimes(count, BLUR_RATE, generator))
    small = F.avg_pool2d(pictures, 2)
    back = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.lerp(pictures, back, _sometimes(count, SHRINK_RATE, generator))


def _blur(pictures: Tensor, sigma: float = 1.3, radius: int = 3) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, device=pictures.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
