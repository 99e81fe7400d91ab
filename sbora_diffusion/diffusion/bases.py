"""Base models: pocket, a folder, a hub id or a single file → a pipeline that concepts refer to."""

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from torch import Tensor, nn

from sbora_diffusion.core.concept import public_base_name
from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError, SboraError
from sbora_diffusion.core.fingerprint import Fingerprint, fingerprint
from sbora_diffusion.diffusion.drawing import RecordedUNet
from sbora_diffusion.diffusion.families import (
    FAMILIES,
    Family,
    Told,
    family_named,
    family_of,
)
from sbora_diffusion.diffusion.graphs import device_obstacle
from sbora_diffusion.diffusion.offloading import Offloading
from sbora_diffusion.diffusion.runtime import USUAL, Runtime, compile_in_place, fix_workspaces
from sbora_diffusion.diffusion.targets import adaptable, target_layers
from sbora_diffusion.diffusion.tokens import text_encoders

POCKET = Path(__file__).parent.parent / "pocket"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(eq=False)
class Base:
    """A loaded base model.

    Attributes:
        reference: what the user gave: "pocket", a folder, a hub id or a file.
        pipeline: stock diffusers; concepts are attached to or folded into it.
        family: name of its row in `families.py`.
        folded: whether concepts are folded into its weights now.
        runtime: how its models are run.
        recorded: its denoiser's calls while pictures are drawn, as CUDA graphs.
        offloading: which of its models wait in the CPU's memory, if any do.
    """

    reference: str
    pipeline: Any
    family: str
    folded: bool = False
    runtime: Runtime = USUAL
    recorded: RecordedUNet = field(default_factory=RecordedUNet, init=False, repr=False)
    offloading: Offloading | None = field(default=None, init=False, repr=False)

    @property
    def kind(self) -> Family:
        """What its family has in common."""
        return family_named(self.family)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return getattr(self.pipeline, self.kind.denoiser)

    def predicted(
        self, denoiser: nn.Module, noised: Tensor, timesteps: Tensor, told: Told
    ) -> Tensor:
        """The prediction (B, C, H, W) of the denoiser, as it is or as it was prepared to train."""
        scale = self.pipeline.vae_scale_factor
        return self.kind.call(denoiser, noised, timesteps, told, scale)

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
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def device(self) -> torch.device:
        """Where its models work."""
        return self.offloading.device if self.offloading else self.denoiser.device

    def keep_on_device(self, names: Collection[str]) -> None:
        """Let these models stay on the device, and all others wait, where models are offloaded."""
        if self.offloading:
            self.offloading.keep(names)

    def rest(self) -> None:
        """Let models that are offloaded wait again."""
        if self.offloading:
            self.offloading.rest()


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
        reference: "pocket", a folder in diffusers layout, a hub id, or a `.safetensors` checkpoint;
            where a folder of the same name without `.safetensors` lies beside a checkpoint, it
            gives configurations and tokenizers, which diffusers else fetches from the hub.
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
    kind = family_of(reference, pipeline)
    for model in _models(pipeline):
        model.requires_grad_(False)
    if not kind.half_vae and pipeline.vae.dtype == torch.float16:
        pipeline.vae.float()
    if runtime.compiled:
        for _, model in adaptable(pipeline):
            compile_in_place(model)
    base = Base(reference, pipeline, kind.name, runtime=runtime)
    try:
        _place(base, device or best_device())
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {error}", "try --device cpu"
        ) from error
    return base


def _place(base: Base, device: str) -> None:
    if base.runtime.deterministic and torch.device(device).type == "cuda":
        fix_workspaces()
    if base.runtime.offloaded:
        place = torch.empty(0, device=device).device  # with its number: hooks compare places
        base.offloading = Offloading(base.pipeline, place)
    else:
        base.pipeline.to(device)


def _models(pipeline: Any) -> list[nn.Module]:
    adapted = dict(adaptable(pipeline))
    return [*adapted.values(), pipeline.vae, *text_encoders(pipeline).values()]


def _read(reference: str, dtype: torch.dtype) -> Any:
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


def _read_file(path: Path, options: dict) -> Any:
    if path.suffix != ".safetensors":
        raise FormatError(f"base {path} is not a .safetensors file", "convert the checkpoint first")
    beside = path.with_suffix("")
    try:
        if (beside / "model_index.json").is_file():
            kind, config = _named_by(beside), {"config": str(beside), "local_files_only": True}
            options |= _left_out(beside, kind)
            return kind.pipeline.from_single_file(str(path), **options, **config)
        return _family_of_file(path).pipeline.from_single_file(str(path), **options)
    except SboraError:
        raise
    except Exception as error:
        raise FormatError(
            f"base {path} cannot be read as a checkpoint: {error}",
            f"without the hub, put configurations and tokenizers as a folder {beside.name}/ beside",
        ) from error


def _family_of_file(path: Path) -> Family:
    """The family that diffusers takes a checkpoint for, by the shapes of its tensors."""
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    kind = infer_diffusers_model_type(tensors)
    for family in FAMILIES:
        if kind in family.checkpoints:
            return family
    raise FormatError(f"base {path} is a checkpoint of another kind: {kind}", _known())


def _read_folder(path: Path, options: dict) -> Any:
    if not (path / "model_index.json").is_file():
        raise FormatError(
            f"base {path} has no model_index.json", "give a model folder in diffusers layout"
        )
    try:
        kind = _named_by(path)
        options |= _left_out(path, kind)
        return kind.pipeline.from_pretrained(str(path), **options, local_files_only=True)
    except SboraError:
        raise
    except Exception as error:
        raise FormatError(
            f"base {path} cannot be read: {error}", "give another, or fetch it again"
        ) from error


def _named_by(folder: Path) -> Family:
    """The first family of the pipeline that a model folder names."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    for family in FAMILIES:
        if family.pipeline.__name__ == name:
            return family
    raise FormatError(f"base {folder} is a {str(name)[:80]}, which no known family has", _known())


def _left_out(folder: Path, kind: Family) -> dict[str, None]:
    """T5 and its tokenizer where the folder has none: diffusers wants to be told."""
    absent = [e for e in kind.encoders if not e.trained and not (folder / e.model).is_dir()]
    return {name: None for encoder in absent for name in (encoder.model, encoder.tokenizer)}


def _known() -> str:
    return f"known families: {', '.join(family.name for family in FAMILIES)}"


def _download(reference: str, options: dict) -> Any:
    try:
        return DiffusionPipeline.from_pretrained(reference, **options)
    except Exception as error:
        raise ResourceError(
            f"base {reference!r} is not a local folder and cannot be fetched from the hub",
            "check the name and the connection, or download it and give the folder",
        ) from error
