"""The optimizer steps of a training, of one concept or of several in one batch."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.core.checkpoints import Content
from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.graphs import Obstacle, Recorded, adding_at_once, device_obstacle
from sbora_diffusion.diffusion.learning import LearningModels
from sbora_diffusion.diffusion.lesson import Batches, Lesson
from sbora_diffusion.diffusion.noise import Draw, Objective
from sbora_diffusion.diffusion.optimizers import optimizer_named
from sbora_diffusion.diffusion.processes import (
    accelerator_for,
    own_rows,
    refuse_apart,
    shared,
)
from sbora_diffusion.diffusion.state import Batch, Feed, TrainingState
from sbora_diffusion.diffusion.texts import Texts
from sbora_diffusion.diffusion.tokens import (
    FIRST,
    PlaceholderTokens,
    TrainableTokens,
    text_encoders,
)


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step.

    Attributes:
        step: counts from 1.
        loss: the mean over the concepts.
        rate: share of the full learning rates, 0..1.
        losses: of each concept.
    """

    step: int
    steps: int
    loss: float
    rate: float
    seconds: float
    losses: tuple[float, ...] = ()


class TrainingLoop(ABC):
    """Lessons that are learned together, each from its own stream of batches.

    A subclass brings the trained factors by `_put_in`, `_factors` and `_take_out`, and may come in
    between by `_clip` and `_after_step`.

    Args:
        base: unadapted; `close()` gives it back as it was.
        lessons: at least one; they agree in all settings that the loop itself reads.

    Attributes:
        obstacle: why forward and backward pass are not replayed as a CUDA graph; None if they are.
        resumed: set before the steps begin, the state that they go on from.
        state: once the steps have begun, all that decides those that follow.

    Raises:
        ConflictError: a placeholder is in the base's vocabulary; nothing was changed.
    """

    def __init__(self, base: Base, lessons: Sequence[Lesson]):
        self.base, self.lessons, self.config = base, lessons, lessons[0].config
        precision, accumulated = self.config.mixed_precision, self.config.gradient_accumulation
        self.accelerator = accelerator_for(base, precision, accumulated)
        self._together = self.accelerator.num_processes > 1
        if self._together:
            refuse_apart(self.accelerator, self.config)
        self.obstacle = self._obstacle()
        self.resumed: Content | None = None
        self.state: TrainingState | None = None
        base.keep_on_device(self._trained_models())
        try:
            self._attach()
        except BaseException:
            base.keep_on_device(())
            raise

    @abstractmethod
    def _put_in(self) -> None:
        """Add the factors to the layers; the base's output does not change."""

    @abstractmethod
    def _factors(self, component: str) -> list[nn.Parameter]:
        """The trained factors in one component."""

    @abstractmethod
    def _take_out(self) -> None:
        """Remove the factors; may be called again."""

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Limit the norm of the gradient, where a step is due; the norm before, of each lesson or
        of all."""
        return self.accelerator.clip_grad_norm_(parameters, self.config.max_gradient_norm)

    def _after_step(self) -> None:  # noqa: B027 - most have nothing to do here
        """Called after each optimizer step."""

    def _placeholders(self, embedding: nn.Embedding, count: int) -> TrainableTokens:
        """What trains the last `count` rows of an embedding."""
        return TrainableTokens(embedding, count)

    def _attach(self) -> None:
        pipeline = self.base.pipeline
        self.tokens = PlaceholderTokens(pipeline)
        self.tokens.add(
            {
                f"{encoder}.{lesson.subject.settings.token}": vectors
                for lesson in self.lessons
                for encoder, vectors in lesson.initial.items()
            }
        )
        self._put_in()
        self.models = {name: getattr(pipeline, name) for name in self._trained_models()}
        self.texts = Texts(self.base, text_encoders(pipeline).keys() - self.models.keys())
        self.trainables = {
            name: self._trainable(name) for name in self.models if name != self.base.kind.denoiser
        }
        checkpointing = self.config.gradient_checkpointing
        self._learning = LearningModels(self.models, self.accelerator, checkpointing)

    def _trained_models(self) -> list[str]:
        """The denoiser, and the text encoders through which something is learned."""
        kind, config = self.base.kind, self.config
        trained = [e.model for e in kind.present(self.base.pipeline) if e.trained]
        reads = config.rate_tokens > 0 or config.rate_text_encoder > 0
        return [kind.denoiser, *(trained if reads else [])]

    def _trainable(self, encoder: str) -> TrainableTokens:
        """Let the placeholders of one text encoder be trained."""
        model = self.models[encoder]
        count = sum(len(lesson.initial[encoder]) for lesson in self.lessons)
        tokens = self._placeholders(model.get_input_embeddings(), count)
        model.set_input_embeddings(tokens)
        return tokens

    @property
    def trainable(self) -> TrainableTokens:
        """The placeholders of the first text encoder."""
        return self.trainables[FIRST]

    def _train_mode(self, on: bool) -> None:
        """Pictures drawn between the steps must not see it."""
        self._learning.train_mode(on)

    def steps(self) -> Iterator[StepRecord]:
        """Train; one record after each optimizer step, of those that `resumed` has not done.

        Raises:
            NonFiniteError: a loss, a gradient or what is trained became NaN or infinite; in the
                step in which it did, or the next one.
            FormatError: `resumed` is another training's.
        """
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)  # dropout draws from the global generator
        models = self._prepared()
        streams = [lesson.streams() for lesson in self.lessons]
        objective = self.base.kind.objective(
            self.base.pipeline.scheduler.config, config.noise_offset, config.min_snr_gamma
        )
        groups = self._parameter_groups()
        parameters = [p for group in groups for p in group["params"]]
        on_gpu = self.base.device.type == "cuda"
        optimizer = optimizer_named(config.optimizer, groups, config.weight_decay, on_gpu)
        ema = _average(parameters, config.ema) if config.ema else None
        generators = [own.generator for own, *_ in streams]
        feed = Feed(partial(self._batches, objective, streams), generators)
        state = self._begun(TrainingState(parameters, optimizer, accelerator.scaler, feed, ema))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate, state.step - 1)
        optimizer = accelerator.prepare(optimizer)
        learn = self._recorded(partial(self._learn, models, objective), parameters)
        for step in range(state.step + 1, config.steps + 1):
            began, totals = time.monotonic(), [0.0] * len(streams)
            self._train_mode(True)
            for _ in range(config.gradient_accumulation):
                with accelerator.accumulate():
                    losses = torch.stack([learn(*batch) for batch in feed.batches]).sum(0)
                    feed.draw()  # while the device works
                    if self._together:
                        losses = shared(losses, parameters, self.accelerator)
                    norms = self._clip(parameters) if accelerator.sync_gradients else losses[:0]
                    for k, loss in enumerate(self._finite(losses, norms, step)):
                        totals[k] += loss / config.gradient_accumulation
                    state.whole = not accelerator.sync_gradients
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=learn.obstacle is not None)
            self.obstacle = learn.obstacle
            self._after_step()
            if ema:
                ema.step(parameters)
            rate = self._rate(step - 1)
            schedule.step()
            state.completed(step)
            self._train_mode(False)
            mean, seconds = sum(totals) / len(totals), time.monotonic() - began
            yield StepRecord(step, config.steps, mean, rate, seconds, tuple(totals))
        if ema:
            ema.copy_to(parameters)
            self._after_step()

    def _begun(self, state: TrainingState) -> TrainingState:
        """The state before the first step that is due, its batches drawn."""
        if self.resumed:
            state.restore(self.resumed)
            self._after_step()
        state.feed.draw()
        state.completed(state.step)
        self.state = state
        return state

    def _obstacle(self) -> Obstacle | None:
        config = self.config
        reasons = {
            Obstacle.DROPOUT: config.dropout > 0.0,
            Obstacle.CHECKPOINTING: config.gradient_checkpointing,
            Obstacle.LOSS_SCALE: config.mixed_precision == "fp16",
        }
        found = next((reason for reason, holds in reasons.items() if holds), None)
        return device_obstacle(self.base.device, self.base.runtime.graphs) or found

    def _recorded(self, learn: Callable[..., Tensor], parameters: list[nn.Parameter]) -> Recorded:
        """`learn`, with gradients that stay where they are if it is to be recorded."""
        gradients = []
        if self.obstacle is None:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            learn = partial(adding_at_once, learn, parameters)
        return Recorded(learn, self.base.device, self.obstacle, gradients)

    def _prepared(self) -> dict[str, nn.Module]:
        """The models as accelerate runs them, by name; texts that stay are read once."""
        models = self._learning.prepared()
        with self.accelerator.autocast():
            self.texts.keep(text for lesson in self.lessons for text in lesson.captions)
        return models

    def _learn(
        self, models: Mapping[str, nn.Module], objective: Objective, *batch: Tensor
    ) -> Tensor:
        """(lessons,), the loss of each; adds to the gradients."""
        losses = self._losses(models, objective, Batch(*batch))
        self.accelerator.backward(losses.sum())
        return losses.detach()

    def _losses(
        self, models: Mapping[str, nn.Module], objective: Objective, batch: Batch
    ) -> Tensor:
        """(lessons,), the loss of each; all in one pass."""
        ids, *draw = batch
        noised = objective.noised(Draw(*draw))
        dtype = self.base.denoiser.dtype
        told = self.texts.told(models, ids, dtype)
        denoiser, latents = models[self.base.kind.denoiser], noised.noised.to(dtype)
        predicted = self.base.predicted(denoiser, latents, noised.timesteps, told)
        return objective.errors(predicted, noised).view(len(self.lessons), -1).mean(1)

    def _batches(self, objective: Objective, streams: list[list[Batches]]) -> list[Batch]:
        """The next batch of the lessons' own pictures and, if there are any, of prior ones."""
        own, *prior = [self._batch(objective, kind) for kind in zip(*streams, strict=True)]
        share = self.config.prior_weight
        return [own, *(batch._replace(weight=share * batch.weight) for batch in prior)]

    def _batch(self, objective: Objective, streams: Sequence[Batches]) -> Batch:
        drawn = [stream.draw(objective, self.config.batch_size) for stream in streams]
        ids = torch.stack([self.texts.ids(text) for _, texts in drawn for text in texts])
        batch = Batch(ids, *map(torch.cat, zip(*(draw for draw, _ in drawn), strict=True)))
        return own_rows(batch, self.accelerator) if self._together else batch

    def _parameter_groups(self) -> list[dict[str, Any]]:
        config, denoiser = self.config, self.base.kind.denoiser
        vectors = [tokens.vectors for tokens in self.trainables.values()]
        groups: list[dict[str, Any]] = [{"params": vectors, "lr": config.rate_tokens}]
        rates = {denoiser: config.rate_unet, "text_encoder": config.rate_text_encoder}
        for component, rate in rates.items():
            if factors := self._factors(component):
                groups.append({"params": factors, "lr": rate})
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)
        if not any(group["lr"] > 0 for group in groups):
            raise ConfigError("all learning rates are 0", "raise rate_unet or rate_tokens")
        # Where the schedule does not begin at its first step, it asks for the rates of that one.
        return [{**group, "initial_lr": group["lr"]} for group in groups if group["lr"] > 0]

    def _rate(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
        if config.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    def _finite(self, losses: Tensor, norms: Tensor, step: int) -> list[float]:
        """The losses; with the norms in one transfer, since each waits for the device."""
        values = torch.cat([losses, norms.view(-1).to(losses)]).tolist()
        found, norms_found = values[: len(losses)], values[len(losses) :]
        if bad := [loss for loss in found if not math.isfinite(loss)]:
            raise self._broken("the loss", bad[0], step)
        scaled = self.config.mixed_precision == "fp16"  # its scaler leaves such steps out by itself
        if bad := [norm for norm in norms_found if not math.isfinite(norm) and not scaled]:
            raise self._broken("the gradient's norm", bad[0], step)
        return found

    def _broken(self, what: str, value: float, step: int) -> NonFiniteError:
        assert self.state
        if not self.state.finite():
            what = f"what was trained is no longer finite, and {what}"
        return NonFiniteError(
            f"{what} became {value} at step {step}",
            "lower rate_unet and rate_tokens, or use mixed_precision = 'no'",
        )

    def close(self) -> None:
        """Give the base back without factors and placeholders."""
        self._train_mode(False)
        self._learning.close()
        self._take_out()
        self.tokens.set({})
        self.base.keep_on_device(())


def _average(parameters: list[nn.Parameter], decay: float) -> Any:
    """A moving average, whose decay rises to this; imported where it is wanted."""
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay, foreach=True)
