"""Crosstalk in what the UNet predicts, without drawing.

Each concept has rows of its own: its reference pictures, noised, under its own prompts. The rows of
all concepts stand in one batch, and each row hears the concepts that a condition lets it hear. At
one timestep, noise prediction and v-prediction differ by a factor that is the same for all rows,
which ratios do not see.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from crosstalk_study.plan import layer_group
from torch import Generator, Tensor

from diagnosis_study.plan import ALONE, BASE, OTHERS, heard
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.folded_set import concept_updates
from sbora_diffusion.core.mixed import Bank, stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.dataset import load_examples
from sbora_diffusion.diffusion.noise import Draw, Objective
from sbora_diffusion.diffusion.pipeline import encode, token_vectors
from sbora_diffusion.diffusion.prompts import spelled
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens

PROMPTS = (
    "a photo of {}",
    "a photo of {} on the beach",
    "a photo of {} in a kitchen",
    "a drawing of {} in the snow",
)
"""With {} where the token stands."""


@dataclass(frozen=True, eq=False)
class Scenes:
    """What is predicted: C subjects, P prompts and pictures of each, T timesteps of each of these.

    Attributes:
        prompts: C · P.
        noised: (C · P · T, channels, H, W).
        timesteps: (C · P · T,).
        shape: C, P, T.
    """

    prompts: list[str]
    noised: Tensor
    timesteps: Tensor
    shape: tuple[int, int, int]


def scenes(base: Base, subjects: Sequence[Subject], timesteps: Sequence[int], seed: int) -> Scenes:
    """Prompt k of a subject stands beside its reference picture k, starting again after the last.

    Args:
        seed: of the noise, which no two rows share.
    """
    pictures = torch.stack([p for subject in subjects for p in _squares(base, subject)])
    shape = len(subjects), len(PROMPTS), len(timesteps)
    latents = encode(base, pictures).cpu().repeat_interleave(len(timesteps), 0)
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(seed))
    times = torch.tensor(timesteps).repeat(len(pictures))
    objective = Objective(base.pipeline.scheduler.config, 0.0, None)
    batch = objective.noised(Draw(latents, noise, times, torch.ones(len(times))))
    prompts = [spelled(p.format(s.settings.token)) for s in subjects for p in PROMPTS]
    return Scenes(prompts, batch.noised.to(base.device), times.to(base.device), shape)


def _squares(base: Base, subject: Subject) -> list[Tensor]:
    """A picture for each prompt, (3, H, W)."""
    examples = load_examples(subject, base.resolution, copies=1, flip=False, seed=0)
    return [examples[k % len(examples)].pixels for k in range(len(PROMPTS))]


class Crowd:
    """Concepts that can all be heard in one batch, each row those that a condition names.

    Args:
        base: unadapted; left as it was.
        concepts: of one variant and the same layers, with ranges that do not overlap.
    """

    def __init__(self, base: Base, concepts: Sequence[Concept]):
        self.base, self.count = base, len(concepts)
        self.layers = target_layers(base.pipeline)
        updates = [concept_updates(concept, 1.0) for concept in concepts]
        self.banks = {
            name: stacked(
                first.variant,
                [[found[name]] for found in updates],
                (self.layers[name].out_features, self.layers[name].in_features),
                self.layers[name].weight,
            )
            for name, first in updates[0].items()
        }
        self._vectors = {t: v for concept in concepts for t, v in token_vectors(concept).items()}

    @contextmanager
    def under(self, condition: str) -> Iterator[None]:
        """Within, batches have as many rows of each concept, in the order of the concepts."""
        device = self.base.device
        banks = {
            name: [joined(bank, heard(condition, layer_group(name), self.count).to(device))]
            for name, bank in self.banks.items()
        }
        tokens = PlaceholderTokens(self.base.pipeline)
        tokens.add(self._vectors)
        try:
            with mixed_rows(self.layers, banks):
                yield
        finally:
            tokens.set({})


def joined(bank: Bank, mask: Tensor) -> Bank:
    """A bank whose entry i sums those entries q of another that mask[i, q] names.

    Args:
        mask: (entries, C), the weight of each of C entries in each new one.
    """
    count, rank = bank.indices.shape
    factor = bank.factor.movedim(0, 1) if bank.variant == "fa" else bank.factor
    form = (1, -1, count * rank) if bank.variant == "fa" else (1, count * rank, -1)
    return Bank(
        bank.variant,
        factor.reshape(form).expand(len(mask), -1, -1),
        bank.indices.reshape(1, -1).expand(len(mask), -1),
        (mask.to(bank.scale)[:, :, None] * bank.scale).flatten(1),
    )


@torch.no_grad()
def predictions(
    crowd: Crowd,
    found: Scenes,
    condition: str,
    see: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """What the UNet predicts, (C, P, T, values).

    Args:
        see: gets the input of each adapted layer, (C · P · T, tokens, in) or (C · P, tokens, in).
    """
    base = crowd.base
    inputs = {name: crowd.layers[name] for name in crowd.banks} if see else {}
    with crowd.under(condition), watched(inputs, see or _ignored), _exact_convolutions():
        states, _ = base.pipeline.encode_prompt(found.prompts, base.device, 1, False)
        states = states.repeat_interleave(found.shape[2], 0)
        predicted = base.pipeline.unet(found.noised, found.timesteps, states).sample
    return predicted.double().view(*found.shape, -1)


def crosstalk(
    crowd: Crowd, found: Scenes, see: Callable[[str, Tensor], None] | None = None
) -> dict[str, list[list[float]]]:
    """Mean squared change of the prediction, by subject and timestep.

    Args:
        see: see `predictions`; called while each concept is alone.

    Returns:
        ALONE → what a concept changes in the base; each of `OTHERS` → what the others change in the
        concept alone.
    """
    alone = predictions(crowd, found, ALONE, see)
    changes = {ALONE: alone - predictions(crowd, found, BASE)}
    for condition in OTHERS:
        changes[condition] = predictions(crowd, found, condition) - alone
    return {name: by_timestep(change) for name, change in changes.items()}


def by_timestep(change: Tensor) -> list[list[float]]:
    """(C, P, T, values) → mean squares (C, T)."""
    return change.square().mean(dim=(1, 3)).tolist()


def _ignored(_name: str, _x: Tensor) -> None:
    """Sees nothing."""


def _exact_convolutions():
    """On a GPU, fp32 throughout: differences are small beside what is predicted."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
