"""Compose scenes from sprites and backgrounds, in batches, on any device."""

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from world.backgrounds import FLAT_COLOURS, SIZE, draw_scene
from world.drawing_styles import redraw
from world.plans import IMAGE_SIZE, LAYERS, SUBJECTS, ScenePlanner
from world.sprites import SpriteBank


def _draw_variants(job: tuple[str, int, int]) -> np.ndarray:
    name, variants, seed = job
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    return np.stack([np.asarray(draw_scene(name, rng)) for _ in range(variants)])


class Composer:
    """Renders plans: backgrounds (V, 3, 160, 160) and sprites (N, 4, 96, 96) live on `device`."""

    def __init__(self, bank: SpriteBank, planner: ScenePlanner, seed: int, device: torch.device):
        jobs = [(name, planner.variants, seed) for name in planner.scenes]
        with ProcessPoolExecutor() as pool:
            drawn = np.concatenate(list(pool.map(_draw_variants, jobs)))
        self.backgrounds = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous().to(device)
        self.sprites = bank.pixels.to(device)
        self.gamma = torch.tensor([s.gamma for s in bank.sprites], device=device)
        self.colours = torch.tensor(list(FLAT_COLOURS.values()), device=device) / 255
        self.device = device

    @torch.no_grad()
    def compose(self, layers: Tensor, background: Tensor) -> Tensor:
        """Plans (B, LAYERS, 7) and (B, 7) → pictures (B, 3, 128, 128) in [−1, 1]."""
        layers, background = layers.to(self.device), background.to(self.device)
        canvas = self._backdrop(background)
        for row in range(LAYERS):
            rows = (layers[:, row, 0] >= 0).nonzero().squeeze(1)  # most rows have one subject
            if len(rows):
                canvas[rows] = self._add(canvas[rows], layers[rows, row], background[rows], row)
        pictures = redraw(canvas.clamp(0, 1), background[:, 6].long(), background[:, 1:3].long())
        return pictures * 2 - 1

    def _add(self, canvas: Tensor, placed: Tensor, background: Tensor, row: int) -> Tensor:
        if row < SUBJECTS:
            canvas = canvas * (1 - self._shadow(placed, background[:, 5]))
        layer = self._place(placed)
        return canvas * (1 - layer[:, 3:]) + layer[:, :3]

    def _backdrop(self, background: Tensor) -> Tensor:
        chosen = self.backgrounds[background[:, 0].long()]
        centre = (background[:, 1:3] * 2 + IMAGE_SIZE) / SIZE - 1
        span = IMAGE_SIZE / SIZE
        flip = 1 - 2 * background[:, 3]
        theta = torch.zeros(len(chosen), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1] = span * flip, span
        theta[:, 0, 2], theta[:, 1, 2] = centre[:, 0], centre[:, 1]
        cropped = _sample(chosen.float() / 255, theta)
        return (cropped * background[:, 4, None, None, None]).clamp(0, 1)

    def _place(self, placed: Tensor) -> Tensor:
        """Premultiplied RGBA (B, 4, 128, 128) of one layer."""
        which, x, y, scale, angle, mirror, tint = placed.unbind(1)
        pixels = self.sprites[which.long()].float() / 255
        colours = self._tinted(pixels[:, :3], self.gamma[which.long()], tint)
        pixels = torch.cat([colours * pixels[:, 3:], pixels[:, 3:]], 1)
        sign = 1 - 2 * mirror
        cos, sin = angle.cos() / scale, angle.sin() / scale
        first = torch.stack([cos * sign, sin * sign, -(cos * x + sin * y) * sign], 1)
        second = torch.stack([-sin, cos, sin * x - cos * y], 1)
        return _sample(pixels, torch.stack([first, second], 1))

    def _tinted(self, colours: Tensor, gamma: Tensor, tint: Tensor) -> Tensor:
        """Shades of one colour: dark parts go towards black, light parts towards white."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=self.device)
        light = (colours * weights[:, None, None]).sum(1, keepdim=True)
        light = light.clamp(0, 1) ** gamma[:, None, None, None]
        target = self.colours[tint.clamp_min(0).long()][:, :, None, None]
        dark, bright = 2 * light * target, target + (2 * light - 1) * (1 - target)
        shaded = 0.15 * target + 0.85 * torch.where(light < 0.5, dark, 0.6 * bright + 0.4 * target)
        return torch.where((tint >= 0)[:, None, None, None], shaded, colours)

    def _shadow(self, placed: Tensor, strength: Tensor) -> Tensor:
        """A soft ellipse under the subject, (B, 1, 128, 128) in 0..0.4."""
        axis = (torch.arange(IMAGE_SIZE, device=self.device) + 0.5) * 2 / IMAGE_SIZE - 1
        x, y, scale = (placed[:, k, None, None] for k in (1, 2, 3))
        dx = (axis[None, None, :] - x) / (0.75 * scale)
        dy = (axis[None, :, None] - (y + 0.93 * scale)) / (0.16 * scale)
        return (0.4 * strength[:, None, None] * torch.exp(-2 * (dx**2 + dy**2)))[:, None]


def _sample(pixels: Tensor, theta: Tensor) -> Tensor:
    size = [len(pixels), pixels.shape[1], IMAGE_SIZE, IMAGE_SIZE]
    grid = F.affine_grid(theta, size, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)
