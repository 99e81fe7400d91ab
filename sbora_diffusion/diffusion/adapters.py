"""SBoRA adapters in a pipeline: put in, fill from a concept, read out, take away."""

import warnings

from diffusers import StableDiffusionPipeline
from torch import nn

from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from sbora_diffusion.diffusion.targets import by_component, name_prefix


def inject(
    pipeline: StableDiffusionPipeline,
    adapter: str,
    layers: list[str],
    variant: Variant,
    rank: int,
    alpha: float,
    start: int,
    seed: int,
    dropout: float = 0.0,
    merge_key: str | None = None,
) -> dict[str, SboraLinear]:
    """Add one zero adapter to the named layers of UNet and text encoder.

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
            model.add_adapter(config, adapter_name=adapter)
        adapted |= {name: model.get_submodule(path) for name, path in paths.items()}
    return adapted


def inject_concept(pipeline: StableDiffusionPipeline, concept: Concept, weight: float) -> None:
    """Add a trained concept as an adapter of its own name."""
    meta = concept.meta
    adapted = inject(
        pipeline, meta.name, list(concept.layers), meta.variant, meta.rank, meta.alpha,
        meta.start, meta.allocation_seed, merge_key=meta.digest,
    )  # fmt: skip
    for name, layer in adapted.items():
        layer.sbora_factor[meta.name].data.copy_(concept.layers[name].factor)
        layer.set_scale(meta.name, weight)


def eject(pipeline: StableDiffusionPipeline, adapter: str) -> None:
    """Take one adapter out of UNet and text encoder."""
    if adapter in (getattr(pipeline.unet, "peft_config", None) or {}):
        pipeline.unet.delete_adapters(adapter)
    if adapter in (getattr(pipeline.text_encoder, "peft_config", None) or {}):
        pipeline.text_encoder.delete_adapter(adapter)
    for model in (pipeline.unet, pipeline.text_encoder):
        _unwrap(model)


def activate(pipeline: StableDiffusionPipeline, adapters: list[str]) -> None:
    """Make exactly these adapters active, in both models, and freeze them."""
    for model in (pipeline.unet, pipeline.text_encoder):
        for module in model.modules():
            if isinstance(module, SboraLinear):
                module.set_adapter([a for a in adapters if a in module.configs], inference_mode=True)


def trained_layers(adapted: dict[str, SboraLinear], adapter: str) -> dict[str, LayerFactor]:
    """What a concept file stores, copied to the CPU."""
    return {
        name: LayerFactor(
            layer.sbora_indices[adapter].detach().cpu().clone(),
            layer.sbora_factor[adapter].detach().cpu().clone(),
        )
        for name, layer in adapted.items()
    }


def _unwrap(model: nn.Module) -> None:
    """Put the plain linear layers back where no adapter is left, so that key names are the base's."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SboraLinear) and not module.configs:
            model.set_submodule(path, module.base_layer)
    if not getattr(model, "peft_config", None):
        model._hf_peft_config_loaded = False


def _refuse_missing(model: nn.Module, paths: dict[str, str]) -> None:
    present = dict(model.named_modules())
    missing = [name for name, path in paths.items() if path not in present]
    if missing:
        raise BaseMismatch(
            f"the base lacks {len(missing)} of {len(paths)} adapted layers, first {missing[0]!r}",
            "give the concept's own base with --base",
        )
