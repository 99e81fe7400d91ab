"""The optimizer steps of a training, of one concept or of several in one batch."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.lesson import Lesson, Stream
from sbora_diffusion.diffusion.noise import NoisedBatch, Objective
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, TrainableTokens


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


class TrainingLoop:
    """Lessons that are learned together, each from its own stream of batches.

    A subclass brings the trained factors by `_put_in`, `_factors` and `_take_out`, and may come in
    between by `_clip` and `_after_step`.

    Args:
        base: unadapted; `close()` gives it back as it was.
        lessons: at least one; they agree in all settings that the loop itself reads.

    Raises:
        ConflictError: a placeholder is in the base's vocabulary; nothing was changed.
    """

    def __init__(self, base: Base, lessons: Sequence[Lesson]):
        self.base, self.lessons, self.config = base, lessons, lessons[0].config
        self.accelerator = _accelerator(base, self.config)
        self._attach()

    def _put_in(self) -> None:
        """Add the factors to the layers; the base's output does not change."""
        raise NotImplementedError

    def _factors(self, component: str) -> list[nn.Parameter]:
        """The trained factors in one component."""
        raise NotImplementedError

    def _take_out(self) -> None:
        """Remove the factors; may be called again."""
        raise NotImplementedError

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        """Limit the norm of the gradient, where a step is due."""
        self.accelerator.clip_grad_norm_(parameters, self.config.max_gradient_norm)

    def _after_step(self) -> None:
        """Called after each optimizer step."""

    def _attach(self) -> None:
        pipeline, config = self.base.pipeline, self.config
        self.tokens = PlaceholderTokens(pipeline)
        initial = {lesson.subject.settings.token: lesson.initial for lesson in self.lessons}
        self.tokens.add(initial)
        self._put_in()
        embedding = pipeline.text_encoder.get_input_embeddings()
        self.trainable = TrainableTokens(embedding, sum(map(len, initial.values())))
        pipeline.text_encoder.set_input_embeddings(self.trainable)
        if config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.text_encoder.gradient_checkpointing_enable()

    def _train_mode(self, on: bool) -> None:
        """Dropout and the text encoder's checkpointing work in train mode alone; pictures drawn
        between the steps must not see it."""
        self.base.pipeline.unet.train(on)
        self.base.pipeline.text_encoder.train(on)

    def steps(self) -> Iterator[StepRecord]:
        """Train; one record after each optimizer step.

        Raises:
            NonFiniteError: a loss became NaN or infinite.
        """
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)  # dropout draws from the global generator
        streams = [lesson.streams() for lesson in self.lessons]
        objective = Objective(
            self.base.pipeline.scheduler.config, config.noise_offset, config.min_snr_gamma
        )
        groups = self._parameter_groups()
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        unet, text_encoder, optimizer = accelerator.prepare(
            self.base.pipeline.unet, self.base.pipeline.text_encoder, optimizer
        )
        parameters = [p for group in groups for p in group["params"]]
        for step in range(1, config.steps + 1):
            began, totals = time.monotonic(), [0.0] * len(streams)
            self._train_mode(True)
            for _ in range(config.gradient_accumulation):
                with accelerator.accumulate(unet):
                    losses = self._all_losses(unet, text_encoder, objective, streams)
                    for k, loss in enumerate(losses.tolist()):
                        totals[k] += self._finite(loss, step) / config.gradient_accumulation
                    accelerator.backward(losses.sum())
                    if accelerator.sync_gradients:
                        self._clip(parameters)
                    optimizer.step()
                    optimizer.zero_grad()
            self._after_step()
            rate = schedule.get_last_lr()[0] / groups[0]["initial_lr"]
            schedule.step()
            self._train_mode(False)
            mean, seconds = sum(totals) / len(totals), time.monotonic() - began
            yield StepRecord(step, config.steps, mean, rate, seconds, tuple(totals))

    def _all_losses(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        objective: Objective,
        streams: list[list[Stream]],
    ) -> Tensor:
        """(lessons,), the loss of each, that of its prior pictures included."""
        own, *prior = zip(*streams, strict=True)
        losses = torch.stack(self._losses(unet, text_encoder, objective, own))
        for kind in prior:
            extra = torch.stack(self._losses(unet, text_encoder, objective, kind))
            losses = losses + self.config.prior_weight * extra
        return losses

    def _losses(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        objective: Objective,
        streams: Sequence[Stream],
    ) -> list[Tensor]:
        """The loss on a batch from each stream, all in one pass; their rows stand in order."""
        drawn = [stream.draw(objective, self.config.batch_size) for stream in streams]
        batches = [batch for batch, _ in drawn]
        states = text_encoder(self._ids([word for _, words in drawn for word in words]))[0]
        noised = torch.cat([batch.noised for batch in batches])
        timesteps = torch.cat([batch.timesteps for batch in batches])
        predicted = unet(noised, timesteps, states.to(noised.dtype)).sample
        return _each(objective, predicted, batches)

    def _ids(self, words: list[str]) -> Tensor:
        pipeline = self.base.pipeline
        words = pipeline.maybe_convert_prompt(words, pipeline.tokenizer)
        encoded = pipeline.tokenizer(
            words, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipeline.tokenizer.model_max_length,
        )  # fmt: skip
        return encoded.input_ids.to(self.base.device)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rates = {"unet": self.config.rate_unet, "text_encoder": self.config.rate_text_encoder}
        groups: list[dict[str, Any]] = [
            {"params": [self.trainable.vectors], "lr": self.config.rate_tokens}
        ]
        for component, rate in rates.items():
            if factors := self._factors(component):
                groups.append({"params": factors, "lr": rate})
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)
        if not any(group["lr"] > 0 for group in groups):
            raise ConfigError("all learning rates are 0", "raise rate_unet or rate_tokens")
        return [group for group in groups if group["lr"] > 0]

    def _rate(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
        if config.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    def _finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} at step {step}",
                "lower rate_unet and rate_tokens, or use mixed_precision = 'no'",
            )
        return loss

    def close(self) -> None:
        """Give the base back without factors and placeholders."""
        for model in (self.base.pipeline.unet, self.base.pipeline.text_encoder):
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast's forward
        self.accelerator.free_memory()
        self._train_mode(False)
        if self.config.gradient_checkpointing:
            self.base.pipeline.unet.disable_gradient_checkpointing()
            self.base.pipeline.text_encoder.gradient_checkpointing_disable()
        self._take_out()
        self.tokens.set({})


def _each(objective: Objective, predicted: Tensor, batches: list[NoisedBatch]) -> list[Tensor]:
    parts = predicted.split([len(batch.noised) for batch in batches])
    return [objective.loss(part, batch) for part, batch in zip(parts, batches, strict=True)]


def _accelerator(base: Base, config: TrainConfig) -> Accelerator:
    """Accelerate keeps one precision for the whole process: a training must not be bound to that
    of the one before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        cpu=base.device.type == "cpu",
    )
