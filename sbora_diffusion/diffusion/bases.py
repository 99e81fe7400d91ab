"""Base models: pocket, a folder, a hub id or a single file → a pipeline that concepts refer to."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from sbora_diffusion.core.concept import public_base_name
from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.core.fingerprint import Fingerprint, fingerprint
from sbora_diffusion.diffusion.drawing import RecordedUNet
from sbora_diffusion.diffusion.graphs import device_obstacle
from sbora_diffusion.diffusion.runtime import USUAL, Runtime, compile_in_place
from sbora_diffusion.diffusion.targets import target_layers

POCKET = Path(__file__).parent.parent / "pocket"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """One row per model family: how to recognise it and what its checkpoints are called."""

    name: str
    cross_attention: int


FAMILIES = (Family("pocket", 192), Family("sd1", 768), Family("sd2", 1024))


@dataclass(eq=False)
class Base:
    """A loaded base model.

    Attributes:
        reference: what the user gave: "pocket", a folder, a hub id or a file.
        pipeline: stock diffusers; concepts are attached to or folded into it.
        folded: whether concepts are folded into its weights now.
        runtime: how its models are run.
        recorded: its UNet's calls while pictures are drawn, as CUDA graphs.
    """

    reference: str
    pipeline: StableDiffusionPipeline
    family: str
    folded: bool = False
    runtime: Runtime = USUAL
    recorded: RecordedUNet = field(default_factory=RecordedUNet, init=False, repr=False)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Digests of the unfolded attention weights; read it before anything is folded."""
        layers = target_layers(self.pipeline)
        return fingerprint((name, layer.weight) for name, layer in layers.items())

    @property
    def key(self) -> str:
        """A short name of this base for the library: family and the fingerprint's digest."""
        text = json.dumps(self.fingerprint, sort_keys=True).encode()
        return f"{self.family}-{hashlib.sha256(text).hexdigest()[:12]}"

    @property
    def public_name(self) -> str:
        """The reference where it means something elsewhere (pocket, hub id), else ""."""
        return public_base_name(self.reference)

    @property
    def repeats(self) -> bool:
        """Whether what is computed once is computed again by the same recorded or compiled code."""
        unrecorded = device_obstacle(self.device, self.runtime.graphs)
        return self.runtime.compiled or unrecorded is None

    @property
    def resolution(self) -> int:
        """Pixels a side that the model was made for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return self.pipeline.unet.device


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the best one present."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_base(
    reference: str = "pocket",
    device: str | None = None,
    dtype: str = "fp32",
    runtime: Runtime = USUAL,
) -> Base:
    """Load a base model, ready for inference.

    Args:
        reference: "pocket", a folder in diffusers layout, a hub id, or a `.safetensors` checkpoint.
        device: e.g. "cuda" or "cpu"; the best one present by default.
        dtype: "fp32", "fp16" or "bf16".
        runtime: how its models are run.

    Raises:
        ConfigError: nothing is there under this reference, or the device is missing.
        FormatError: it is there, but is not a model that can be read.
        ResourceError: a hub id cannot be downloaded.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be fp32, fp16 or bf16, got {dtype!r}")
    pipeline = _read(reference, DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False)
    try:
        pipeline.to(device or best_device())
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {error}", "try --device cpu"
        ) from error
    if runtime.compiled:
        compile_in_place(pipeline.unet)
        compile_in_place(pipeline.text_encoder)
    return Base(reference, pipeline, _family(reference, pipeline), runtime=runtime)


def _read(reference: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    path = POCKET if reference == "pocket" else Path(reference)
    options = {
        "dtype": dtype,
        "safety_checker": None,
        "requires_safety_checker": False,
        "use_safetensors": True,  # else a folder's .bin files would be unpickled
    }
    logging.getLogger("diffusers.pipelines.pipeline_utils").setLevel(logging.ERROR)
    if path.is_file():
        return _read_file(path, options)
    if path.is_dir():
        return _read_folder(path, options)
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise ConfigError(
            f"base {reference!r} does not exist",
            "give 'pocket', a folder in diffusers layout, a .safetensors checkpoint or a hub id",
        )
    return _download(reference, options)


def _read_file(path: Path, options: dict) -> StableDiffusionPipeline:
    if path.suffix != ".safetensors":
        raise FormatError(f"base {path} is not a .safetensors file", "convert the checkpoint first")
    try:
        return StableDiffusionPipeline.from_single_file(str(path), **options)
    except Exception as error:
        raise FormatError(f"base {path} cannot be read as a checkpoint: {error}") from error


def _read_folder(path: Path, options: dict) -> StableDiffusionPipeline:
    if not (path / "model_index.json").is_file():
        raise FormatError(
            f"base {path} has no model_index.json", "give a model folder in diffusers layout"
        )
    try:
        return StableDiffusionPipeline.from_pretrained(str(path), **options, local_files_only=True)
    except Exception as error:
        raise FormatError(f"base {path} cannot be read: {error}") from error


def _download(reference: str, options: dict) -> StableDiffusionPipeline:
    try:
        return StableDiffusionPipeline.from_pretrained(reference, **options)
    except Exception as error:
        raise ResourceError(
            f"base {reference!r} is not a local folder and cannot be fetched from the hub",
            "check the name and the connection, or download it and give the folder",
        ) from error


def _family(reference: str, pipeline: StableDiffusionPipeline) -> str:
    width = pipeline.unet.config.cross_attention_dim
    for family in FAMILIES:
        if family.cross_attention == width:
            return family.name
    raise FormatError(
        f"base {reference!r} has cross-attention width {width}, which no known family has",
        f"known families: {', '.join(f'{f.name} ({f.cross_attention})' for f in FAMILIES)}",
    )
