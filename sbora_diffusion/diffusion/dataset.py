"""Reference images → training pictures and captions."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sbora_diffusion.core.errors import DataError, SboraError
from sbora_diffusion.diffusion.buckets import Size, bucket_of
from sbora_diffusion.diffusion.concepts import Subject

MAX_PIXELS = 64_000_000  # checked before decoding: a small file can hold a huge picture
MAX_SIDE = 32_768  # Pillow keeps a pointer to each row
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded; Pillow would also start Ghostscript for a PostScript file of any name."""
TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "{}",
    "a close view of {}",
    "a photo of the {}",
    "an image of {}",
)


@dataclass(frozen=True)
class Example:
    """One training picture (3, H, W) in [−1, 1], the captions that may stand for it, and how much
    of each pixel counts (1, H, W), all without a mask."""

    pixels: Tensor
    captions: tuple[str, ...]
    mask: Tensor | None = None


def open_image(path: Path) -> Image.Image:
    """Read one picture as RGB, turned upright; transparency is laid over white.

    At most 24 bytes of memory are needed for a pixel.

    Raises:
        DataError: not a picture in one of `FORMATS`, damaged, or larger than 64 megapixels or
            32,768 pixels a side.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of either works or raises
            return _read(path)
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except SboraError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise DataError(
            f"{path} is not a picture that can be read", "replace it or take it out of the folder"
        ) from error


def open_mask(path: Path) -> Image.Image:
    """What a picture's transparency leaves visible, upright, in grey; all of it if it has none.

    Raises:
        DataError: nothing is visible.
    """
    open_image(path)  # whatever cannot be read is refused there
    with Image.open(path, formats=FORMATS) as image:
        image.draft("RGB", (2048, 2048))
        mask = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    if not mask.getextrema()[1]:
        raise DataError(f"{path} is transparent everywhere", "replace it, or leave out masked_loss")
    return mask


def _read(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
            raise _too_large(path, f"{image.width}×{image.height} pixels")
        image.draft("RGB", (2048, 2048))  # lets JPEG decode at a fraction of a huge size
        return _upright_rgb(image)


def _too_large(path: Path, found: str) -> DataError:
    limit = f"at most {MAX_PIXELS // 1_000_000} megapixels and {MAX_SIDE} a side are read"
    return DataError(f"{path} is too large ({found}), {limit}", "make it smaller")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip it to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop(image: Image.Image, size: Size, zoom: float, rng: random.Random) -> Image.Image:
    """A random window of `zoom` times the largest one with this size's aspect, resized to it."""
    height, width = size
    across = max(1, round(min(image.width, image.height * width / height) * zoom))
    down = max(1, round(min(image.height, image.width * height / width) * zoom))
    left, top = rng.randint(0, image.width - across), rng.randint(0, image.height - down)
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB → (3, H, W) in [−1, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def load_examples(
    subject: Subject,
    side: int,
    copies: int,
    flip: bool,
    seed: int,
    masked: bool = False,
    unit: int | None = None,
) -> list[Example]:
    """All training pictures: every reference centred and as random crops.

    The first copy is the centred picture, the second its mirror image if `flip`, the others crops.

    Args:
        side: of squares, in pixels.
        copies: pictures made from each reference; every second one is mirrored if `flip`.
        seed: of the crops.
        masked: whether transparency says what counts.
        unit: pictures keep about their aspect, in sizes of about the square's area whose sides are
            multiples of so many pixels; squares without.
    """
    rng, examples = random.Random(seed), []
    for path in subject.images:
        image, mask = open_image(path), open_mask(path) if masked else None
        size = bucket_of((image.height, image.width), side, unit) if unit else (side, side)
        captions = _captions(subject, path)
        for copy in range(copies):
            before = rng.getstate()
            picture = _copy(image, size, copy, flip, rng)
            seen = None
            if mask is not None:
                rng.setstate(before)  # the same window
                seen = _counts(_copy(mask, size, copy, flip, rng))
            examples.append(Example(to_tensor(picture), captions, seen))
    return examples


def _copy(image: Image.Image, size: Size, copy: int, flip: bool, rng: random.Random) -> Image.Image:
    picture = (
        crop(image, size, rng.uniform(0.8, 1.0), rng)
        if copy > flip  # with `flip` the first two are the centred one and its mirror image
        else ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
    )
    return ImageOps.mirror(picture) if flip and copy % 2 else picture


def _counts(mask: Image.Image) -> Tensor:
    """Grey → (1, H, W) in 0..1."""
    return torch.from_numpy(np.asarray(mask, np.float32) / 255)[None]


def _captions(subject: Subject, image: Path) -> tuple[str, ...]:
    own = subject.caption(image)
    return (own,) if own else tuple(t.format(subject.settings.token) for t in TEMPLATES)
