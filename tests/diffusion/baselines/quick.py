"""Quick recipes, and concepts with random parts."""

from typing import Any

import torch

from sbora_diffusion.diffusion.baselines.adapted import Adapted, AdaptedMeta, Form
from sbora_diffusion.diffusion.baselines.custom_diffusion import READS_TEXT
from sbora_diffusion.diffusion.baselines.interface import Method
from sbora_diffusion.diffusion.baselines.layerwise import cross_attentions
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.targets import target_layers

QUICK: dict[str, Any] = {
    "steps": 3, "batch_size": 2, "copies": 1, "resolution": 32, "warmup_steps": 1, "seed": 3,
    "prior_images": 2, "preservation": 0.0, "schedule": "constant",
}  # fmt: skip
RATE = 0.02
RANK = 4


def quick(method: Method, **changes: Any) -> TrainConfig:
    """The method's own recipe, with what it trains at a high rate."""
    own = method.config
    rates = {
        name: RATE
        for name in ("rate_unet", "rate_text_encoder", "rate_tokens")
        if getattr(own, name) > 0
    }
    rank = {"rank": RANK} if own.rank > RANK else {}
    return own.model_copy(update={**QUICK, **rates, **rank, **changes})


def random_concept(
    base: Base,
    name: str,
    form: Form = "low-rank",
    method: str = "lora",
    layerwise: bool = False,
    size: float = 0.1,
    vectors: int = 2,
) -> Adapted:
    """One whose parts change every layer that the form has."""
    generator = torch.Generator().manual_seed(sum(name.encode()))

    def random(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator)

    layers = {}
    for path, layer in target_layers(base.pipeline).items():
        out, inn = layer.weight.shape
        if form == "full" and READS_TEXT.search(path):
            layers[path] = {"delta": random(out, inn)}
        elif form in ("low-rank", "magnitude"):
            layers[path] = {"down": random(3, inn), "up": random(out, 3)}
            if form == "magnitude":
                layers[path]["magnitude"] = 1 + random(out).abs()
    width = base.pipeline.text_encoder.config.hidden_size
    attentions = (len(cross_attentions(base.pipeline)),) if layerwise else ()
    meta = AdaptedMeta(
        method=method, form=form, name=name, class_noun="toy", token=f"<{name}>",
        base_key=base.key, training={},
    )  # fmt: skip
    return Adapted(meta, layers, random(vectors, *attentions, width))
