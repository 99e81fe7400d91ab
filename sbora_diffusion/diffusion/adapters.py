"""SBoRA adapters in a pipeline: put in, fill from a concept, read out, take away."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import BaseMismatch, FormatError
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from sbora_diffusion.core.tuner.layer import Gate
from sbora_diffusion.diffusion.targets import (
    DENOISERS,
    adaptable,
    by_component,
    name_prefix,
    target_layers,
)


def adapter_name(concept: str) -> str:
    """The adapter of a concept. PEFT keeps adapters as attributes of torch modules, so a concept
    called `train` or `double` needs a name that no module has."""
    return f"concept-{concept}"


def inject(
    pipeline: Any,
    concept: str,
    layers: list[str],
    variant: Variant,
    rank: int,
    alpha: float,
    start: int,
    seed: int,
    dropout: float = 0.0,
    merge_key: str | None = None,
) -> dict[str, SboraLinear]:
    """Add a concept's zero adapter to the named layers of denoiser and text encoders.

    Returns:
        Canonical name → adapted layer; as many as were asked for.

    Raises:
        BaseMismatch: the pipeline lacks one of the layers.
        CapacityError: the range does not fit.
    """
    adapted: dict[str, SboraLinear] = {}
    for component, paths in by_component(pipeline, layers).items():
        model = getattr(pipeline, component)
        _refuse_missing(model, paths)
        config = SboraConfig(
            r=rank,
            alpha=alpha,
            variant=variant,
            dropout=dropout,
            target_modules=list(paths.values()),
            allocation_seed=seed,
            start=start,
            name_prefix=name_prefix(component, model),
            merge_key=merge_key,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of every second adapter
            model.add_adapter(config, adapter_name=adapter_name(concept))
        adapted |= {name: model.get_submodule(path) for name, path in paths.items()}
    return adapted


def inject_concept(pipeline: Any, concept: Concept, weight: float) -> None:
    """Add a trained concept as an adapter."""
    meta = concept.meta
    refuse_misfits(pipeline, concept)
    adapted = inject(
        pipeline, meta.name, list(concept.layers), meta.variant, meta.rank, meta.alpha,
        meta.start, meta.allocation_seed, merge_key=meta.digest,
    )  # fmt: skip
    for name, layer in adapted.items():
        layer.sbora_factor[adapter_name(meta.name)].data.copy_(concept.layers[name].factor)
        layer.set_scale(adapter_name(meta.name), weight)


def set_weight(pipeline: Any, concept: str, weight: float) -> None:
    """Change the weight λ of one concept's adapter."""
    for layer in adapted_layers(pipeline):
        layer.set_scale(adapter_name(concept), weight)


def eject(pipeline: Any, concept: str) -> None:
    """Take one concept's adapter out of all models."""
    adapter = adapter_name(concept)
    for component, model in adaptable(pipeline):
        if adapter in (getattr(model, "peft_config", None) or {}):
            # The name that diffusers has for it, or transformers.
            delete = model.delete_adapters if component in DENOISERS else model.delete_adapter
            delete(adapter)
        _unwrap(model)


def activate(pipeline: Any, concepts: list[str]) -> None:
    """Make exactly these concepts' adapters active, in all models, and freeze them; their updates
    are added in the order given."""
    adapters = [adapter_name(concept) for concept in concepts]
    for layer in adapted_layers(pipeline):
        layer.set_adapter([a for a in adapters if a in layer.configs], inference_mode=True)


def adapted_layers(pipeline: Any) -> Iterator[SboraLinear]:
    """Every layer with adapters, of all models."""
    for _, model in adaptable(pipeline):
        yield from (module for module in model.modules() if isinstance(module, SboraLinear))


@contextmanager
def gated(pipeline: Any, gate: Gate) -> Iterator[None]:
    """Let a gate decide how much of each adapter's update is added, in all models.

    It also acts on ordinary LoRAs, where the update is what `lora_B` gives.
    """
    layers = list(adapted_layers(pipeline))
    for layer in layers:
        layer.gate = gate
    hooks = _lora_hooks(pipeline, gate)
    try:
        yield
    finally:
        for layer in layers:
            layer.gate = None
        for hook in hooks:
            hook.remove()


def _lora_hooks(pipeline: Any, gate: Gate) -> list[RemovableHandle]:
    return [
        up.register_forward_hook(partial(_gate_update, gate, adapter))
        for _, model in adaptable(pipeline)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for adapter, up in layer.lora_B.items()
    ]


def _gate_update(
    gate: Gate, adapter: str, _up: nn.Module, inputs: tuple[Tensor], update: Tensor
) -> Tensor:
    # The gate reads of its input only rows, tokens and dtype, which the down factor keeps.
    return gate(adapter, inputs[0]) * update


def trained_layers(
    adapted: dict[str, SboraLinear], concept: str, dtype: torch.dtype
) -> dict[str, LayerFactor]:
    """What a concept file stores, copied to the CPU; factors rounded to `dtype`."""
    adapter = adapter_name(concept)
    return {
        name: LayerFactor(
            layer.sbora_indices[adapter].detach().cpu().clone(),
            layer.sbora_factor[adapter].detach().to("cpu", dtype, copy=True),
        )
        for name, layer in adapted.items()
    }


def _unwrap(model: nn.Module) -> None:
    """Put the plain linear layers back where no adapter is left: key names are the base's again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SboraLinear) and not module.configs:
            model.set_submodule(path, module.base_layer)
    if not getattr(model, "peft_config", None):
        setattr(model, "_hf_peft_config_loaded", False)  # noqa: B010


def refuse_misfits(pipeline: Any, concept: Concept) -> None:
    """Raise FormatError if a factor does not have the shape of its layer."""
    side = 0 if concept.meta.variant == "fa" else 1
    bases = target_layers(pipeline)
    wrong = [
        name
        for name, layer in sorted(concept.layers.items())
        if name in bases and layer.factor.shape[side] != bases[name].weight.shape[side]
    ]
    if wrong:
        raise FormatError(
            f"concept {concept.meta.name!r}: the factor of {wrong[0]!r} has shape "
            f"{tuple(concept.layers[wrong[0]].factor.shape)}, the layer "
            f"{tuple(bases[wrong[0]].weight.shape)}; {len(wrong)} factors do not fit",
            "get the concept file again from its author",
        )


def _refuse_missing(model: nn.Module, paths: dict[str, str]) -> None:
    present = dict(model.named_modules())
    missing = [name for name, path in paths.items() if path not in present]
    if missing:
        raise BaseMismatch(
            f"the base lacks {len(missing)} of {len(paths)} adapted layers, first {missing[0]!r}",
            "give the concept's own base with --base",
        )
