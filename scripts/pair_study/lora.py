"""Ordinary LoRA (Hu et al. 2021, arXiv 2106.09685) as a peer: PEFT's own, in SBoRA's training.

Loop, targets, captions and placeholder token are SBoRA's; only the adapter differs.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.core.schema import TokenMeta
from sbora_diffusion.diffusion.adapters import adapter_name
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.targets import by_component
from sbora_diffusion.diffusion.tokens import PlaceholderTokens
from sbora_diffusion.diffusion.training import ConceptTraining

DOCUMENT = "lora"  # key of the JSON in the file's metadata
TOKEN = "token"


class LoraMeta(BaseModel):
    """The JSON document of a LoRA's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    class_noun: str
    tokens: tuple[TokenMeta, ...]
    base_key: str
    rank: int
    training: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Lora:
    """A trained LoRA with its token.

    Attributes:
        factors: canonical name of the layer → down (r, in) and up (out, r).
        vectors: (vectors, dim) of the placeholder token.
    """

    meta: LoraMeta
    factors: dict[str, tuple[Tensor, Tensor]]
    vectors: Tensor

    @property
    def parameters(self) -> int:
        """Trainable numbers in the factors."""
        return sum(down.numel() + up.numel() for down, up in self.factors.values())


class LoraTraining(ConceptTraining):
    """A training of a LoRA of rank `config.rank` and alpha = rank; read it with `lora()`.

    The config's `rate_unet` and `rate_text_encoder` are the learning rates of both factors; what it
    says of indices is without meaning here.
    """

    def _put_in(self) -> None:
        config, name = self.config, self.subject.settings.name
        self.adapted = inject_lora(
            self.base.pipeline, name, list(self.layers), config.rank, config.dropout
        )
        generator = torch.Generator().manual_seed(config.seed)
        for layer in self.adapted.values():
            down = layer.lora_A[adapter_name(name)].weight
            start = torch.empty(down.shape)
            # PEFT's own start, from a generator of its own: the same on every device.
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            down.data.copy_(start)

    def _factors(self, component: str) -> list[nn.Parameter]:
        name = adapter_name(self.subject.settings.name)
        return [
            factor[name].weight
            for path, layer in self.adapted.items()
            if path.startswith(component)
            for factor in (layer.lora_A, layer.lora_B)
        ]

    def _take_out(self) -> None:
        eject_lora(self.base.pipeline, self.subject.settings.name)

    def lora(self) -> Lora:
        """The LoRA as it is now, on the CPU."""
        settings, config = self.subject.settings, self.config
        meta = LoraMeta(
            name=settings.name,
            class_noun=settings.class_noun,
            tokens=(TokenMeta(token=settings.token, initializer=settings.class_noun),),
            base_key=self.base.key,
            rank=config.rank,
            training=config.model_dump(mode="json"),
        )
        name = adapter_name(settings.name)
        factors = {
            path: (_copied(layer.lora_A[name]), _copied(layer.lora_B[name]))
            for path, layer in self.adapted.items()
        }
        return Lora(meta, factors, self.token_vectors())


class LoraPipeline:
    """A base with LoRAs attached as live adapters; for `Regions` it stands in for a
    `ConceptPipeline`. Every weight is 1.

    Args:
        base: unadapted; LoRAs come and go without a trace.
    """

    def __init__(self, base: Base):
        self.base = base
        self.concepts: dict[str, Lora] = {}
        self.tokens = PlaceholderTokens(base.pipeline)

    @property
    def order(self) -> list[str]:
        return sorted(self.concepts)

    def switch(self, loras: Sequence[Lora]) -> None:
        """Make exactly these the attached ones.

        Raises:
            BaseMismatch: one belongs to another base; nothing was changed.
        """
        for lora in loras:
            _refuse_other_base(self.base, lora)
        for name in [n for n, lora in self.concepts.items() if lora not in loras]:
            eject_lora(self.base.pipeline, name)
            del self.concepts[name]
        for lora in loras:
            if lora.meta.name not in self.concepts:
                _fill(self.base.pipeline, lora)
                self.concepts[lora.meta.name] = lora
        self.tokens.set({lora.meta.tokens[0].token: lora.vectors for lora in loras})
        adapters = [adapter_name(name) for name in self.order]
        for layer in _lora_layers(self.base.pipeline):
            layer.set_adapter(adapters, inference_mode=True)


def inject_lora(
    pipeline: StableDiffusionPipeline,
    concept: str,
    layers: list[str],
    rank: int,
    dropout: float = 0.0,
) -> dict[str, LoraLayer]:
    """Add a LoRA whose up factors are zero to the named layers.

    Returns:
        Canonical name → adapted layer.
    """
    adapted: dict[str, LoraLayer] = {}
    for component, paths in by_component(pipeline, layers).items():
        model = getattr(pipeline, component)
        config = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(paths.values())
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of every second adapter
            model.add_adapter(config, adapter_name=adapter_name(concept))
        adapted |= {name: model.get_submodule(path) for name, path in paths.items()}
    return adapted


def eject_lora(pipeline: StableDiffusionPipeline, concept: str) -> None:
    """Take one LoRA out of UNet and text encoder."""
    adapter = adapter_name(concept)
    if adapter in (getattr(pipeline.unet, "peft_config", None) or {}):
        pipeline.unet.delete_adapters(adapter)
    if adapter in (getattr(pipeline.text_encoder, "peft_config", None) or {}):
        pipeline.text_encoder.delete_adapter(adapter)
    for model in (pipeline.unet, pipeline.text_encoder):
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer) and not module.r:
                model.set_submodule(path, module.base_layer)
        if not getattr(model, "peft_config", None):
            model._hf_peft_config_loaded = False


def write_lora(path: Path, lora: Lora) -> None:
    """Write the file; an older one gives way when the new one is complete."""
    tensors = {TOKEN: lora.vectors}
    for name, (down, up) in lora.factors.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={DOCUMENT: lora.meta.model_dump_json()})
    part.replace(path)


def read_lora(path: Path) -> Lora:
    """Read what `write_lora` wrote."""
    with safe_open(path, framework="pt") as file:
        meta = LoraMeta(**json.loads(file.metadata()[DOCUMENT]))
        names = [n.removesuffix(".lora_A.weight") for n in file.keys() if ".lora_A." in n]  # noqa: SIM118
        factors = {
            n: (file.get_tensor(f"{n}.lora_A.weight"), file.get_tensor(f"{n}.lora_B.weight"))
            for n in names
        }
        return Lora(meta, factors, file.get_tensor(TOKEN))


def _fill(pipeline: StableDiffusionPipeline, lora: Lora) -> None:
    adapted = inject_lora(pipeline, lora.meta.name, list(lora.factors), lora.meta.rank)
    adapter = adapter_name(lora.meta.name)
    for name, (down, up) in lora.factors.items():
        adapted[name].lora_A[adapter].weight.data.copy_(down)
        adapted[name].lora_B[adapter].weight.data.copy_(up)


def _lora_layers(pipeline: StableDiffusionPipeline) -> list[LoraLayer]:
    return [
        module
        for model in (pipeline.unet, pipeline.text_encoder)
        for module in model.modules()
        if isinstance(module, LoraLayer)
    ]


def _copied(linear: nn.Module) -> Tensor:
    return linear.weight.detach().to("cpu", copy=True)


def _refuse_other_base(base: Base, lora: Lora) -> None:
    if lora.meta.base_key != base.key:
        raise BaseMismatch(
            f"LoRA {lora.meta.name!r} was trained on {lora.meta.base_key}, this is {base.key}",
            "train it again on this base",
        )
