"""DINO ViT-S/16 (arXiv 2104.14294), the self-supervised image feature beside CLIP in papers."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.evaluation.features import BATCH_SIZE, picture_features, ready, silence

ARCHITECTURE = "vit_small_patch16_224.dino"
FETCHED = "timm"
FILES = ("model.safetensors", "pytorch_model.bin", "dino_deitsmall16_pretrain.pth")
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
            weights: a file, as its authors or timm publish it, a folder that holds one of `FILES`,
                or "timm", which fetches it.

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
        with silence():
            return _create(pretrained=True)
    except ConfigError:
        raise
    except Exception as error:
        raise ResourceError(
            "the weights of DINO ViT-S/16 cannot be fetched",
            f"check the connection, or give a file or a folder with {FILES[0]} or {FILES[2]}",
        ) from error


def _file(place: Path) -> Path:
    if place.is_file():
        return place
    for name in FILES:
        if (place / name).is_file():
            return place / name
    raise ConfigError(
        f"{place} holds no weights of DINO ViT-S/16",
        f"give a file, a folder with one of {', '.join(FILES)}, or {FETCHED!r} to fetch them",
    )


def _read(file: Path) -> nn.Module:
    network = _create(pretrained=False)
    try:
        network.load_state_dict(_weights(file))
    except (RuntimeError, TypeError, OSError, ValueError, EOFError, pickle.PickleError) as error:
        raise FormatError(
            f"{file} does not hold the weights of DINO ViT-S/16",
            "give the file that timm or the authors of DINO publish",
        ) from error
    return network


def _weights(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
