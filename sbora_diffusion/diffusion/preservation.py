"""What the frozen base makes of generic prompts, as examples that a concept learns beside its own.

A concept that is to stay silent on prompts without it learns, on such prompts, to predict what the
frozen model predicts (its own teacher; cf. prior preservation, arXiv 2208.12242, which learns from
pictures instead). The teacher speaks before the training begins: each prediction is turned into the
latents and the noise that it would be exactly right for, and these are an example like any other.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Generator

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.buckets import Size
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.noise import Draw, Objective
from sbora_diffusion.diffusion.pipeline import AT_ONCE, draw_latents
from sbora_diffusion.diffusion.texts import Texts
from sbora_diffusion.diffusion.tokens import text_encoders

PICTURES, NOISED, STEPS = 16, 6, 10
"""Generic pictures that are drawn, how often each is noised, and the steps of drawing it."""
SEED = 0
"""The same examples for every concept of a base, whatever its own seed."""

_KNOWN: WeakKeyDictionary[Base, dict[Size, "Preserved"]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Preserved:
    """Examples on which the frozen model is right.

    Attributes:
        examples: (N, …) each, on the CPU.
        captions: N generic prompts.
    """

    examples: Draw
    captions: tuple[str, ...]

    def draw(self, count: int, generator: Generator) -> tuple[Draw, list[str]]:
        """Some of them, with repetition."""
        rows = torch.randint(len(self.captions), (count,), generator=generator)
        chosen = Draw(*(part[rows] for part in self.examples))
        return chosen, [self.captions[row] for row in rows.tolist()]


def preserved_examples(base: Base, size: Size) -> Preserved:
    """The examples of a base; drawn once for each base that is loaded, and each size.

    Args:
        base: unadapted, nothing folded into it.
        size: in pixels, that of the subject's pictures: they share a batch.
    """
    known = _KNOWN.setdefault(base, {})
    if size not in known:
        known[size] = _made(base, size)
    return known[size]


def _made(base: Base, size: Size) -> Preserved:
    prompts = generic_prompts(PICTURES, SEED)
    objective = base.kind.objective(base.pipeline.scheduler.config, 0.0, None)
    texts = Texts(base)
    generator = Generator().manual_seed(SEED)
    parts, captions = [], []
    for start in range(0, PICTURES, AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        seeds = range(start, start + len(some))
        latents = draw_latents(base, some, seeds, STEPS, size=size).cpu()
        for _ in range(NOISED):
            drawn = objective.draw(latents, generator)
            parts.append(_explained(base, texts, objective, drawn, some))
            captions += some
    base.rest()
    return Preserved(Draw(*map(torch.cat, zip(*parts, strict=True))), tuple(captions))


@torch.no_grad()
def _explained(
    base: Base, texts: Texts, objective: Objective, draw: Draw, prompts: list[str]
) -> Draw:
    """The draw with the latents and noise that the model's prediction says."""
    batch, denoiser = objective.noised(draw), base.denoiser
    noised, timesteps = batch.noised.to(base.device, denoiser.dtype), batch.timesteps
    ids = torch.stack([texts.ids(prompt) for prompt in prompts]).to(base.device)
    told = texts.told(text_encoders(base.pipeline), ids, noised.dtype)
    predicted = base.predicted(denoiser, noised, timesteps.to(base.device), told)
    latents, noise = objective.explained(batch, predicted.float().cpu())
    return draw._replace(latents=latents, noise=noise)
