"""Refined merging: gradient descent from the closed form toward what each concept alone predicts.

The closed form (`core/calibration.py`) looks at one layer at a time, as if no other layer changed.
This looks at the end: the entries that the concepts own, of all layers together, are trained so
that the merged model's prediction is that of each concept alone on its own prompts, and the base's
on generic ones, at latents that these draw through. No pictures and no noise of a training are
needed, and nothing but owned entries changes: it is distillation (arXiv 1503.02531) of the models
that hold one concept each into the one that holds them all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.functional import VARIANTS
from sbora_diffusion.core.mixed import Bank, stacked
from sbora_diffusion.core.mixed_layers import mixed_rows
from sbora_diffusion.core.shares import concept_updates
from sbora_diffusion.core.updates import Update
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.families import Told
from sbora_diffusion.diffusion.graphs import Obstacle, Recorded, adding_at_once, device_obstacle
from sbora_diffusion.diffusion.learning import LearningModels
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import hears_nothing
from sbora_diffusion.diffusion.predictions import Predictions
from sbora_diffusion.diffusion.processes import accelerator_for
from sbora_diffusion.diffusion.prompts import spelled
from sbora_diffusion.diffusion.runtime import deterministic
from sbora_diffusion.diffusion.targets import adaptable, target_layers
from sbora_diffusion.diffusion.texts import Texts

STEPS = 300
"""Of the descent as `sbora merge` takes them; fewer, or fewer predictions in each, leave a model
worse than the closed form (docs/crosstalk.md)."""
POSITIONS = 1 << 15
"""Positions of latents that pass the denoiser at once, so that a GPU's memory holds what the
backward pass needs: 32 rows of 32 × 32, or 8 of 64 × 64."""

Banks = Mapping[str, Sequence[Bank]]
"""Layer to a bank for each variant, whose one entry is the sum of all concepts."""


def refined_concepts(
    base: Base,
    concepts: Sequence[Concept],
    heard: Predictions,
    config: CalibrateConfig,
    report: Callable[[int], None],
) -> list[Concept]:
    """Copies of concepts that belong together, with other factors; see `calibrated_concepts`.

    Args:
        base: with the tokens of all concepts and the weights of none.
        concepts: what the descent begins with, of scale 1, in the order of their digests.
        heard: of each concept alone, and of the base.
        report: called with the steps that are done.

    Raises:
        NonFiniteError: the error became NaN or infinite.
    """
    layers = target_layers(base.pipeline)
    updates = {concept.meta.digest: concept_updates(concept, 1.0) for concept in concepts}
    banks = _banks(layers, list(updates.values()))
    factors = [bank.factor for of_layer in banks.values() for bank in of_layer]
    accelerator = accelerator_for(base, config.refine_mixed_precision)
    checkpointing = config.refine_gradient_checkpointing
    learning = LearningModels(dict(adaptable(base.pipeline)), accelerator, checkpointing)
    with (
        closing(learning),
        mixed_rows(layers, banks),
        torch.enable_grad(),
        deterministic(base.device),
    ):
        _descend(base, learning, factors, heard, config, report)
    found = _split(banks, list(updates.values()))
    return [Concept(c.meta, found[c.meta.digest], c.embeddings) for c in concepts]


def _banks(
    layers: Mapping[str, nn.Linear], updates: Sequence[Mapping[str, Update]]
) -> dict[str, list[Bank]]:
    """Trainable banks of all updates of each layer."""
    found = {}
    for name in sorted(set().union(*updates)):
        weight = layers[name].weight
        shape = (weight.shape[0], weight.shape[1])
        parts = [(v, group) for v in VARIANTS if (group := _of_variant(updates, name, v))]
        found[name] = [_trainable(stacked(v, [group], shape, weight)) for v, group in parts]
    return found


def _of_variant(updates: Sequence[Mapping[str, Update]], layer: str, variant: str) -> list[Update]:
    here = [of_concept[layer] for of_concept in updates if layer in of_concept]
    return [update for update in here if update.variant == variant]


def _trainable(bank: Bank) -> Bank:
    return Bank(bank.variant, nn.Parameter(bank.factor), bank.indices, bank.scale)


def _split(
    banks: Banks, updates: Sequence[Mapping[str, Update]]
) -> dict[str, dict[str, LayerFactor]]:
    """Digest to layer to its part of the banks."""
    found: dict[str, dict[str, LayerFactor]] = {}
    for layer, of_layer in banks.items():
        for bank in of_layer:
            group = _of_variant(updates, layer, bank.variant)
            dim, trained = group[0].dim, bank.factor.detach()[0].cpu()
            parts = trained.split([len(update.indices) for update in group], dim)
            for update, part in zip(group, parts, strict=True):
                factor = LayerFactor(update.indices, part.contiguous())
                found.setdefault(update.key, {})[layer] = factor
    return found


def _descend(
    base: Base,
    learning: LearningModels,
    factors: Sequence[Tensor],
    heard: Predictions,
    config: CalibrateConfig,
    report: Callable[[int], None],
) -> None:
    parameters = [factor for factor in factors if isinstance(factor, nn.Parameter)]
    texts = _texts(base, heard.texts)
    learn = _learner(base, learning, texts, parameters, config.refine_rows)
    optimizer = torch.optim.Adam(parameters, lr=config.refine_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, config.refine))
    ids = torch.stack([texts.ids(spelled(text)) for text in heard.texts])
    told = torch.tensor([bool(text) or not hears_nothing(base) for text in heard.texts])
    generator = Generator().manual_seed(config.seed)
    at_once = max(1, POSITIONS // heard.noised[0, 0].numel())
    for step in range(1, config.refine + 1):
        rows = torch.randint(len(ids), (config.refine_rows,), generator=generator)
        errors = [
            learn(ids[some], told[some], *(part[some] for part in heard[1:]))
            for some in rows.split(at_once)
        ]
        if not torch.stack(errors).sum().isfinite():
            raise NonFiniteError(
                f"the error became NaN or infinite at step {step} of the refinement",
                "lower `refine_rate`, or merge with --no-refine",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()
        report(step)


def _learner(
    base: Base,
    learning: LearningModels,
    texts: Texts,
    parameters: Sequence[nn.Parameter],
    rows: int,
) -> Recorded:
    """Rows of predictions to their share of the mean squared error, whose gradient is added."""
    models, silent = learning.prepared(), hears_nothing(base)
    denoiser = models[base.kind.denoiser]
    learning.train_mode(learning.checkpointing)

    def learn(
        ids: Tensor, told: Tensor, noised: Tensor, timesteps: Tensor, predicted: Tensor
    ) -> Tensor:
        heard = texts.told(models, ids, noised.dtype)
        if silent:
            heard = silenced(heard, told)
        found = base.predicted(denoiser, noised, timesteps, heard)
        error = F.mse_loss(found.float(), predicted.float()) * (len(ids) / rows)
        error.backward()
        return error.detach()

    gradients = []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    replayed = Obstacle.CHECKPOINTING if learning.checkpointing else None
    obstacle = device_obstacle(base.device, base.runtime.graphs) or replayed
    adding = partial(adding_at_once, learn, parameters)
    return Recorded(adding, base.device, obstacle, gradients)


def _texts(base: Base, texts: Sequence[str]) -> Texts:
    """Reads these texts; what an encoder says that nothing changes is kept."""
    kept = [e.model for e in base.kind.present(base.pipeline) if not e.trained]
    reader = Texts(base, kept)
    reader.keep(spelled(text) for text in texts)
    return reader


def silenced(heard: Told, told: Tensor) -> Told:
    """Zeros in the rows that are told nothing.

    Args:
        told: (B,), bool.
    """
    assert heard.pooled is not None
    return Told(heard.states * told.view(-1, 1, 1), heard.pooled * told.view(-1, 1))


def _rate(steps: int, step: int) -> float:
    """A half cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
