"""Drawing styles that a prompt can ask for, as image operations on batches of pictures.

Every style keeps the subject and the scene readable at 128 px. Textures are fixed periodic maps
that `shift` moves, so a picture, a style and a shift always give the same drawing.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 128
BLOCK = 4  # side of a pixel of the pixel art
LEVELS = 6  # values per channel of the pixel art
TILE = 8  # side of a tile of the mosaic, grout included
GROUT = 0.18  # its grey
GROUT_DEPTH = (0.42, 0.17, 0.0, 0.0, 0.0, 0.0, 0.17, 0.42)  # across a tile; soft for autoencoders
DOT_PERIOD = 8  # of the halftone grid, along its diagonals; divides SIZE
STROKE_ANGLES = tuple(k * math.pi / 4 for k in range(4))
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def redraw(pictures: Tensor, style: Tensor, shift: Tensor) -> Tensor:
    """Draw every picture in its style.

    Args:
        pictures: (B, 3, 128, 128) float32 in [0, 1].
        style: (B,) integer, index into `DRAWING_STYLES`; −1 leaves the picture as it is.
        shift: (B, 2) integer ≥ 0, rows and columns by which the fixed textures move.

    Returns:
        (B, 3, 128, 128) in [0, 1], same type and device; a pure function of the arguments.
    """
    order = style.argsort(stable=True)
    counts = torch.bincount(style + 1, minlength=len(OPERATIONS) + 1).tolist()
    assert len(counts) == len(OPERATIONS) + 1, "style index beyond DRAWING_STYLES"
    drawn = pictures.clone()
    _, *groups = order.split(counts)
    for operation, rows in zip(OPERATIONS.values(), groups, strict=True):
        if len(rows):
            drawn[rows] = operation(pictures[rows], shift[rows]).clamp(0, 1)
    return drawn


def _pixel_art(x: Tensor, shift: Tensor) -> Tensor:
    grid = _saturate(F.avg_pool2d(x, BLOCK), 1.15).clamp(0, 1)
    return _enlarge((grid * (LEVELS - 1)).round() / (LEVELS - 1), BLOCK)


def _watercolour(x: Tensor, shift: Tensor) -> Tensor:
    """Flat washes with pigment gathered at their edges, on grainy paper with a ragged margin."""
    paper, blotch = _shifted(_textures(x.device)[:2], shift).split(1, 1)
    wash = _blur(_kuwahara(x, 3), 3)
    pigment = 0.45 * (2.2 * _edges(wash)).clamp(0, 1) + 0.06 * blotch
    wash = (0.3 + 0.7 * wash) * (1 - pigment)
    wet = torch.sigmoid(0.9 * (_border_distance(x.device) - 5 - 2 * blotch))
    return (0.97 + (wash - 0.97) * wet) * (1 + 0.025 * paper)


def _pencil_sketch(x: Tensor, shift: Tensor) -> Tensor:
    """Colour dodge: the grey picture divided by its blurred self leaves dark lines on white."""
    grey = _luminance(_blur(x, 3))
    lines = ((grey + 0.03) / (_blur(_blur(grey, 9), 9) + 0.03)).clamp(0, 1) ** 2.2
    strokes = _shifted(_textures(x.device)[5:6], shift)
    shade = (1 - grey) ** 1.5 * (0.24 + 0.13 * strokes).clamp_min(0)
    return (0.07 + 0.9 * lines * (1 - shade)).expand_as(x)


def _oil_painting(x: Tensor, shift: Tensor) -> Tensor:
    """Thick patches of colour; bristle marks run along the edges of the picture."""
    paint = _saturate(_kuwahara(x, 5), 1.35)
    bristles = _shifted(_textures(x.device)[2:], shift)
    relief = (bristles * _along_edges(_luminance(paint))).sum(1, keepdim=True)
    return _contrast(paint.clamp(0, 1), 0.3) * (1 + 0.09 * relief) + 0.012 * relief


def _black_and_white_photo(x: Tensor, shift: Tensor) -> Tensor:
    grain = _shifted(_textures(x.device)[:1], shift)
    return (_contrast(_luminance(x), 0.8) + 0.01 * grain).expand_as(x)


def _sepia_photo(x: Tensor, shift: Tensor) -> Tensor:
    """Faded blacks, brown tones and darker corners, as an old print."""
    faded = 0.14 + 0.8 * _contrast(_luminance(_blur(x, 3)), 0.4)
    grain = _shifted(_textures(x.device)[:1], shift)
    tone = x.new_tensor([0.7, 1.0, 1.45])[:, None, None]
    axis = torch.linspace(-1, 1, SIZE, device=x.device)
    vignette = 1 - 0.22 * (axis[:, None] ** 2 + axis**2) ** 1.5
    return (faded * vignette + 0.008 * grain).clamp(0.01, 1) ** tone


def _mosaic(x: Tensor, shift: Tensor) -> Tensor:
    """Square tiles, each with its own glaze, set in dark grout."""
    tiles = _contrast(_saturate(F.avg_pool2d(x, TILE), 1.3).clamp(0, 1), 0.3) * 0.87 + 0.13
    glazed = _enlarge(tiles * (1 + 0.05 * _shifted(_glazes(x.device), shift)), TILE).clamp(0, 1)
    place = torch.arange(SIZE, device=x.device) % TILE
    depth = x.new_tensor(GROUT_DEPTH)[place]
    return glazed + (GROUT - glazed) * torch.maximum(depth[:, None], depth)


def _neon(x: Tensor, shift: Tensor) -> Tensor:
    """Edges as glowing tubes, coloured by the picture, on a dark night."""
    smooth = _blur(_kuwahara(x, 2), 3)
    tube = _blur((4.5 * _edges(smooth) - 0.15).clamp(0, 1), 3)
    light = tube * _vivid(_blur(smooth, 5))
    halo = _blur(_blur(light, 9), 9)
    night = x.new_tensor([0.05, 0.03, 0.12])[:, None, None]
    return night + 0.1 * smooth + 0.9 * halo + light + 0.35 * (tube - 0.6).clamp_min(0)


def _comic(x: Tensor, shift: Tensor) -> Tensor:
    """Flat bright colours within ink lines; dots of ink where the picture is dark."""
    flat = _blur(_kuwahara(x, 3), 3)
    grey = _luminance(flat)
    bands = _soft_steps(grey, 4)
    colour = _saturate(flat * ((bands + 0.12) / (grey + 0.08)).clamp(0, 2), 1.3).clamp(0, 1)
    dots = _shifted(_halftone(x.device), shift)
    dark = (1.1 - 2.2 * grey).clamp(0, 0.8)
    colour = colour * (1 - 0.4 * torch.sigmoid(4 * (dots + 2.4 * dark - 2)) * (dark > 0))
    ink = torch.sigmoid(25 * (_edges(flat) - 0.15))
    return colour * (1 - 0.82 * ink)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixel art": _pixel_art,
    "watercolour": _watercolour,
    "pencil sketch": _pencil_sketch,
    "oil painting": _oil_painting,
    "black and white photo": _black_and_white_photo,
    "sepia photo": _sepia_photo,
    "mosaic": _mosaic,
    "neon": _neon,
    "comic": _comic,
}
DRAWING_STYLES: tuple[str, ...] = tuple(OPERATIONS)


def _kuwahara(x: Tensor, radius: int) -> Tensor:
    """Edge-preserving smoothing: at each pixel the mean of the calmest of four square windows.

    Kuwahara et al., 1976; with the soft choice of Papari et al., 2007 (weights variance^−q), which
    leaves no jagged borders between the windows.
    """
    grey = _luminance(x)
    padded = F.pad(torch.cat([x, grey, grey**2], 1), [radius] * 4, mode="reflect")
    pooled = F.avg_pool2d(padded, radius + 1, stride=1)
    calm = 1 / ((pooled[:, 4:] - pooled[:, 3:4] ** 2).clamp_min(0) + 4e-4) ** 3
    weighted = torch.cat([pooled[:, :3] * calm, calm], 1)
    near, far = slice(0, SIZE), slice(radius, radius + SIZE)
    total = weighted[..., near, near] + weighted[..., near, far]
    total = total + weighted[..., far, near] + weighted[..., far, far]
    return total[:, :3] / total[:, 3:]


def _blur(x: Tensor, side: int) -> Tensor:
    """Mean over side × side pixels, `side` odd; at the border over those that exist."""
    for kernel in ((side, 1), (1, side)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        x = F.avg_pool2d(x, kernel, 1, padding, count_include_pad=False)
    return x


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences down and across, (B, C, 128, 128) each."""
    padded = F.pad(x, [1] * 4, mode="replicate")
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return down, padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]


def _edges(x: Tensor) -> Tensor:
    """The steepest channel's slope, (B, 1, 128, 128)."""
    down, across = _slopes(x)
    return (down**2 + across**2).amax(1, keepdim=True).sqrt()


def _along_edges(grey: Tensor) -> Tensor:
    """How much each of `STROKE_ANGLES` runs along the local edge, (B, 4, 128, 128), sum 1.

    The direction is that of the smoothed structure tensor, in doubled angles.
    """
    down, across = _slopes(grey)
    tensor = torch.cat([across**2 - down**2, 2 * across * down], 1)
    cosine, sine = _blur(_blur(tensor, 9), 9).split(1, 1)
    length = (cosine**2 + sine**2).sqrt() + 1e-4
    angles = 2 * grey.new_tensor(STROKE_ANGLES)[:, None, None]
    return torch.softmax(-4 * (cosine * angles.cos() + sine * angles.sin()) / length, 1)


def _luminance(x: Tensor) -> Tensor:
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _saturate(x: Tensor, factor: float) -> Tensor:
    return torch.lerp(_luminance(x), x, factor)


def _contrast(x: Tensor, strength: float) -> Tensor:
    """Towards the S-curve 3x² − 2x³; x in [0, 1]."""
    return torch.lerp(x, x * x * (3 - 2 * x), strength)


def _soft_steps(x: Tensor, steps: int) -> Tensor:
    """[0, 1] → `steps` even levels in [0, 1] with short ramps between them."""
    scaled = x * (steps - 1)
    level = scaled.floor()
    return (level + torch.sigmoid(14 * (scaled - level - 0.5))) / (steps - 1)


def _vivid(x: Tensor) -> Tensor:
    """Full-strength hue of every pixel; grey pixels turn from magenta to cyan with their light."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    hue = (x - low) / (high - low + 0.02)
    grey = _luminance(x)
    tint = torch.cat([1 - grey, 0.15 + 0.85 * grey, torch.ones_like(grey)], 1)
    return torch.lerp(tint, hue, ((high - low) * 4).clamp(0, 1))


def _enlarge(grid: Tensor, factor: int) -> Tensor:
    return F.interpolate(grid, scale_factor=factor, mode="nearest")


def _shifted(maps: Tensor, shift: Tensor) -> Tensor:
    """Periodic maps (K, S, S), moved by `shift` (B, 2) → (B, K, S, S)."""
    side = maps.shape[-1]
    place = (torch.arange(side, device=maps.device) + shift[:, :, None]) % side
    return maps[:, place[:, 0, :, None], place[:, 1, None, :]].transpose(0, 1)


@lru_cache
def _textures(device: torch.device) -> Tensor:
    """Periodic noise (6, 128, 128): paper grain, blotches, strokes at the four angles."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1.2, 1.2, 0.0), (7.0, 7.0, 0.0), *((5.0, 0.9, angle) for angle in STROKE_ANGLES)]
    return torch.stack([_noise(generator, *shape) for shape in shapes]).to(device)


def _noise(generator: torch.Generator, length: float, width: float, angle: float) -> Tensor:
    """White noise blurred by a Gaussian of these deviations (px), mean 0, deviation 1, ≤ 2.5."""
    white = torch.randn(SIZE, SIZE, generator=generator)
    down, across = torch.fft.fftfreq(SIZE)[:, None], torch.fft.fftfreq(SIZE)
    along = across * math.cos(angle) + down * math.sin(angle)
    athwart = down * math.cos(angle) - across * math.sin(angle)
    passed = torch.exp(-2 * math.pi**2 * ((length * along) ** 2 + (width * athwart) ** 2))
    soft = torch.fft.ifft2(torch.fft.fft2(white) * passed).real
    return ((soft - soft.mean()) / soft.std()).clamp(-2.5, 2.5)


@lru_cache
def _glazes(device: torch.device) -> Tensor:
    """Brightness of the mosaic's tiles, (1, 16, 16) in [−1, 1]."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(1, SIZE // TILE, SIZE // TILE, generator=generator) * 2 - 1).to(device)


@lru_cache
def _halftone(device: torch.device) -> Tensor:
    """Dots on a grid at 45°, (1, 128, 128) in [−2, 2]."""
    axis = torch.arange(SIZE, device=device) * (2 * math.pi / DOT_PERIOD)
    return ((axis[:, None] + axis).cos() + (axis[:, None] - axis).cos())[None]


@lru_cache
def _border_distance(device: torch.device) -> Tensor:
    """Pixels to the nearest border, (128, 128)."""
    axis = torch.arange(SIZE, device=device)
    near = torch.minimum(axis, SIZE - 1 - axis).float()
    return torch.minimum(near[:, None], near)
