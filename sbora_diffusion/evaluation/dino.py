"""DINO ViT-S/16 (arXiv 2104.14294), the self-supervised image feature beside CLIP in papers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.evaluation.features import BATCH_SIZE, picture_features, ready, silence
from sbora_diffusion.evaluation.pickles import no_pickles

ARCHITECTURE = "vit_small_patch16_224.dino"
FETCHED = "timm"
FILE = "model.safetensors"
SHORTER_SIDE, SIDE = 256, 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class DinoFeatures:
    """The class token of DINO ViT-S/16.

    Pictures go in as Custom Diffusion's evaluation gives them: the shorter side at 256 pixels,
    bicubic, the centred 224×224, with ImageNet's mean and deviation.
    """

    network: Any  # a module with methods of its own
    device: torch.device
    name: str = "dino-vits16"

    @classmethod
    def load(cls, weights: str, device: str = "cpu") -> Self:
        """Load it.

        Args:
            weights: a `.safetensors` file, as timm publishes it, a folder that holds `FILE`, or
                "timm", which fetches it.

        Raises:
            ConfigError: timm is not installed, or there is no such file, or the device is unknown.
            FormatError: the file holds something else.
            ResourceError: it cannot be fetched.
        """
        network = _fetched() if weights == FETCHED else _read(_file(Path(weights)))
        return cls(ready(network, device), torch.device(device))

    def images(self, pictures: Sequence[Image.Image], batch_size: int = BATCH_SIZE) -> Tensor:
        """N pictures → (N, 384)."""
        return picture_features(
            pictures, _input, lambda batch: self.network(batch.to(self.device)), batch_size
        )


def _input(picture: Image.Image) -> Tensor:
    """Picture → (3, 224, 224)."""
    from torchvision.transforms import functional as transforms

    resized = transforms.resize(
        picture.convert("RGB"), SHORTER_SIDE, transforms.InterpolationMode.BICUBIC
    )
    pixels = transforms.to_tensor(transforms.center_crop(resized, [SIDE, SIDE]))
    return transforms.normalize(pixels, list(MEAN), list(DEVIATION))


def _create(pretrained: bool) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"DINO needs timm, and {error.name} is not installed",
            "pip install 'sbora-diffusion[eval]'",
        ) from error
    return timm.create_model(ARCHITECTURE, pretrained=pretrained, num_classes=0)


def _fetched() -> nn.Module:
    try:
        with silence(), no_pickles():
            return _create(pretrained=True)
    except (ConfigError, FormatError):
        raise
    except Exception as error:
        raise ResourceError(
            "the weights of DINO ViT-S/16 cannot be fetched",
            f"check the connection, or give a folder with {FILE}",
        ) from error


def _file(place: Path) -> Path:
    if place.is_file():
        return place
    if (place / FILE).is_file():
        return place / FILE
    raise ConfigError(
        f"{place} holds no weights of DINO ViT-S/16",
        f"give a .safetensors file, a folder with {FILE}, or {FETCHED!r} to fetch them",
    )


def _read(file: Path) -> nn.Module:
    network = _create(pretrained=False)
    try:
        network.load_state_dict(load_file(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise FormatError(
            f"{file} does not hold the weights of DINO ViT-S/16 as safetensors",
            f"give the {FILE} that timm publishes",
        ) from error
    return network
