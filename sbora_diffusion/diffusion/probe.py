"""How well a model redraws given pictures: its denoising error, always on the same noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import encode
from sbora_diffusion.diffusion.texts import Texts
from sbora_diffusion.diffusion.tokens import text_encoders

DRAWS = 4


@torch.no_grad()
def denoising_error(base: Base, pictures: Sequence[Tensor], caption: str, seed: int = 0) -> float:
    """Mean squared error of the predicted noise (or velocity), over pictures and timesteps.

    Noise and timesteps depend on the seed and the number of pictures alone, so that two captions,
    or a model before and after training, are compared on the same task.

    Args:
        pictures: each (3, H, W) in [−1, 1].
        caption: what the model is told about all of them.
    """
    pipeline = base.pipeline
    objective = base.kind.objective(pipeline.scheduler.config, 0.0, None)
    generator = torch.Generator().manual_seed(seed)
    latents = encode(base, torch.stack(list(pictures)))
    texts = Texts(base)
    ids = texts.ids(caption).to(base.device).expand(len(latents), -1)
    told = texts.told(text_encoders(pipeline), ids, latents.dtype)
    losses = []
    for _ in range(DRAWS):
        batch = objective.noised(objective.draw(latents, generator))
        predicted = base.predicted(base.denoiser, batch.noised, batch.timesteps, told)
        losses.append(objective.errors(predicted, batch).mean())
    return torch.stack(losses).mean().item()
