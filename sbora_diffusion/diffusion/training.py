"""Training one concept: a generator of step records around a stock pipeline."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from sbora_diffusion.core.allocation import check_capacity
from sbora_diffusion.core.concept import Concept, ConceptMeta, TokenMeta, sealed
from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.core.tuner.folded_training import folded_training
from sbora_diffusion.diffusion.adapters import adapter_name, eject, inject, trained_layers
from sbora_diffusion.diffusion.bases import DTYPES, Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import Example, load_examples, to_tensor
from sbora_diffusion.diffusion.noise import Objective
from sbora_diffusion.diffusion.pipeline import draw, encode
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, TrainableTokens, word_vectors


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step."""

    step: int  # counts from 1
    steps: int
    loss: float
    rate: float  # share of the full learning rates, 0..1
    seconds: float


class ConceptTraining:
    """One concept in training. Use `steps()` to the end, then `concept()`, then `close()`.

    While it is open the base carries the adapter, so pictures can be drawn from `base.pipeline`.
    A subclass may bring another adapter: training knows it by `_put_in`, `_factors` and `_take_out`
    alone.

    Args:
        base: an unadapted base; `close()` gives it back as it was.
        subject: settings and reference images.
        config: the recipe.
        start: first entry of the concept's range, e.g. slot · rank.

    Raises:
        CapacityError, ConflictError, DataError, ConfigError: before anything is changed.
    """

    def __init__(self, base: Base, subject: Subject, config: TrainConfig, start: int):
        self.base, self.subject, self.config, self.start = base, subject, config, start
        self.fingerprint = base.fingerprint
        self.examples = load_examples(
            subject, config.resolution or base.resolution, config.copies, config.flip, config.seed
        )
        self.initial = _initial_vectors(base, subject.settings.class_noun, config.vectors)
        self.layers = target_layers(base.pipeline, config.targets)
        self.widths = {n: layer_width(layer, config.variant) for n, layer in self.layers.items()}
        check_capacity(self.widths, start, start + config.rank)
        self.accelerator = _accelerator(base, config)
        self.prior = self._prior_examples() if config.prior_weight else []
        self._attach()

    def _attach(self) -> None:
        pipeline, config, token = self.base.pipeline, self.config, self.subject.settings.token
        self.tokens = PlaceholderTokens(pipeline)
        self.tokens.add({token: self.initial})
        self._put_in()
        embedding = pipeline.text_encoder.get_input_embeddings()
        self.trainable = TrainableTokens(embedding, len(self.initial))
        pipeline.text_encoder.set_input_embeddings(self.trainable)
        if config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.text_encoder.gradient_checkpointing_enable()

    def _put_in(self) -> None:
        """Add the adapter to `self.layers`; the base's output does not change."""
        config = self.config
        self.adapted = inject(
            self.base.pipeline, self.subject.settings.name, list(self.layers), config.variant,
            config.rank, config.resolved_alpha, self.start, config.allocation_seed, config.dropout,
        )  # fmt: skip

    def _factors(self, component: str) -> list[nn.Parameter]:
        """The adapter's parameters in one component."""
        name = adapter_name(self.subject.settings.name)
        return [
            layer.sbora_factor[name]
            for path, layer in self.adapted.items()
            if path.startswith(component)
        ]

    def _take_out(self) -> None:
        """Remove the adapter from all components."""
        eject(self.base.pipeline, self.subject.settings.name)

    def _train_mode(self, on: bool) -> None:
        """Dropout and the text encoder's checkpointing work in train mode alone; pictures drawn
        between the steps must not see it."""
        self.base.pipeline.unet.train(on)
        self.base.pipeline.text_encoder.train(on)

    def steps(self) -> Iterator[StepRecord]:
        """Train; one record after each optimizer step.

        Where nothing stands in the way (`self.folded.obstacles` says what), the trained columns or
        rows live in the base's weights until the steps end, however they end.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        with folded_training(self.adapted, adapter_name(self.subject.settings.name)) as self.folded:
            yield from self._steps()

    def _steps(self) -> Iterator[StepRecord]:
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)  # dropout draws from the global generator
        generator = torch.Generator().manual_seed(config.seed)
        latents, captions = self._cached(self.examples)
        prior = self._cached(self.prior) if self.prior else None
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
            began, total = time.monotonic(), 0.0
            self._train_mode(True)
            for _ in range(config.gradient_accumulation):
                with accelerator.accumulate(unet):
                    loss = self._loss(unet, text_encoder, objective, latents, captions, generator)
                    if prior:
                        extra = self._loss(unet, text_encoder, objective, *prior, generator)
                        loss = loss + config.prior_weight * extra
                    total += self._finite(loss, step) / config.gradient_accumulation
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            self.folded.write_back()
            rate = schedule.get_last_lr()[0] / groups[0]["initial_lr"]
            schedule.step()
            self._train_mode(False)
            yield StepRecord(step, config.steps, total, rate, time.monotonic() - began)

    def _loss(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        objective: Objective,
        latents: Tensor,
        captions: list[tuple[str, ...]],
        generator: torch.Generator,
    ) -> Tensor:
        rows = torch.randint(len(latents), (self.config.batch_size,), generator=generator)
        words = [_choose(captions[row], generator) for row in rows.tolist()]
        batch = objective.draw(latents[rows.to(latents.device)], generator)
        states = text_encoder(self._ids(words))[0]
        predicted = unet(batch.noised, batch.timesteps, states.to(batch.noised.dtype)).sample
        return objective.loss(predicted, batch)

    def _ids(self, words: list[str]) -> Tensor:
        pipeline = self.base.pipeline
        words = pipeline.maybe_convert_prompt(words, pipeline.tokenizer)
        encoded = pipeline.tokenizer(
            words, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipeline.tokenizer.model_max_length,
        )  # fmt: skip
        return encoded.input_ids.to(self.base.device)

    def _cached(self, examples: list[Example]) -> tuple[Tensor, list[tuple[str, ...]]]:
        """Latents (N, C, H, W) of all pictures, scaled, and their captions."""
        latents = encode(self.base, torch.stack([example.pixels for example in examples]))
        return latents, [example.captions for example in examples]

    def _prior_examples(self) -> list[Example]:
        """Pictures of the bare class noun, drawn by the frozen base."""
        prompt = f"a photo of a {self.subject.settings.class_noun}"
        count, seed = self.config.prior_images, self.config.seed
        pictures = draw(self.base, [prompt] * count, [seed + k for k in range(count)])
        return [Example(to_tensor(picture), (prompt,)) for picture in pictures]

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

    def _finite(self, loss: Tensor, step: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss became {value} at step {step}",
                "lower rate_unet and rate_tokens, or use mixed_precision = 'no'",
            )
        return value

    def concept(self) -> Concept:
        """The trained concept, on the CPU; it can be read at any step."""
        config, settings = self.config, self.subject.settings
        rank = config.rank
        meta = ConceptMeta(
            name=settings.name,
            variant=config.variant,
            rank=rank,
            alpha=config.resolved_alpha,
            slot=self.start // rank if self.start % rank == 0 else None,
            start=self.start,
            stop=self.start + rank,
            allocation_seed=config.allocation_seed,
            family=self.base.family,
            base_name=self.base.public_name,
            fingerprint={name: self.fingerprint[name] for name in self.layers},
            widths=self.widths,
            class_noun=settings.class_noun,
            tokens=(TokenMeta(token=settings.token, initializer=settings.class_noun),),
            training=config.model_dump(mode="json"),
        )
        dtype = DTYPES[config.save_dtype]
        layers = trained_layers(self.adapted, settings.name, dtype)
        embeddings = {f"text_encoder.{settings.token}": self.token_vectors(dtype)}
        return sealed(Concept(meta, layers, embeddings))

    def token_vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The placeholder's vectors (vectors, dim) as they are now, copied to the CPU."""
        return self.trainable.vectors.detach().to("cpu", dtype, copy=True)

    def close(self) -> None:
        """Give the base back without adapter and placeholder."""
        for model in (self.base.pipeline.unet, self.base.pipeline.text_encoder):
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast's forward
        self.accelerator.free_memory()
        self._train_mode(False)
        if self.config.gradient_checkpointing:
            self.base.pipeline.unet.disable_gradient_checkpointing()
            self.base.pipeline.text_encoder.gradient_checkpointing_disable()
        self._take_out()
        self.tokens.set({})


def layer_width(layer: nn.Linear, variant: str) -> int:
    """The dimension that indices are drawn from: inputs for FA, outputs for FB."""
    return layer.in_features if variant == "fa" else layer.out_features


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


def _initial_vectors(base: Base, class_noun: str, count: int | None) -> Tensor:
    """The class noun's own embeddings; repeated or cut to `count`."""
    vectors = word_vectors(base.pipeline, class_noun)
    if not len(vectors):
        raise ConfigError(f"class noun {class_noun!r} has no tokens", "use a plain English noun")
    if count is None:
        return vectors[:8]
    return torch.cat([vectors, vectors[-1:].expand(max(0, count - len(vectors)), -1)])[:count]


def _choose(options: tuple[str, ...], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]
