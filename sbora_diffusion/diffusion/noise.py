"""The denoising objective, for noise prediction, v-prediction and flow matching."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor

from sbora_diffusion.core.errors import ConfigError


@dataclass(frozen=True)
class NoisedBatch:
    """Latents with noise at some timesteps, what is to be predicted, and each sample's weight."""

    noised: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,), or (B, 1, H, W) where parts of the picture count


class Draw(NamedTuple):
    """Clean latents, and what is drawn for them."""

    latents: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    weight: Tensor  # (B,), or (B, 1, H, W)


class Objective:
    """Draws noise and timesteps on the CPU, so that every device sees the same.

    Args:
        scheduler_config: of the pipeline's scheduler.
        noise_offset: strength of a per-channel constant added to the noise.
        min_snr_gamma: clamp of the signal-to-noise weight (arXiv 2303.09556), None for none.
    """

    def __init__(self, scheduler_config, noise_offset: float, min_snr_gamma: float | None):
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.noise_offset, self.min_snr_gamma = noise_offset, min_snr_gamma
        self.velocity = self.scheduler.config.prediction_type == "v_prediction"
        self._alphas = self.scheduler.alphas_cumprod  # the scheduler's own moves to the device

    def draw(self, latents: Tensor, generator: Generator) -> Draw:
        """What a batch of clean latents (B, C, H, W) is noised with, on their device."""
        noise = torch.randn(latents.shape, generator=generator)
        if self.noise_offset:
            shape = (*latents.shape[:2], 1, 1)
            noise = noise + self.noise_offset * torch.randn(shape, generator=generator)
        timesteps = self._timesteps(len(latents), generator)
        weight = self._weight(timesteps).to(latents.device)
        return Draw(latents, noise.to(latents), timesteps.to(latents.device), weight)

    def _timesteps(self, count: int, generator: Generator) -> Tensor:
        steps = self.scheduler.config.num_train_timesteps
        return torch.randint(0, steps, (count,), generator=generator)

    def noised(self, draw: Draw) -> NoisedBatch:
        """Clean latents with the noise that was drawn for them."""
        latents, noise, timesteps, weight = draw
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps) if self.velocity else noise
        return NoisedBatch(noised, timesteps, target, weight)

    def explained(self, batch: NoisedBatch, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that are what was predicted: of all that give these
        noised latents, those whose target is `predicted`."""
        alphas = self._alphas[batch.timesteps].view(-1, 1, 1, 1).to(predicted)
        signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        if self.velocity:
            latents = signal * batch.noised - spread * predicted
            return latents, spread * batch.noised + signal * predicted
        return (batch.noised - spread * predicted) / signal, predicted

    def errors(self, predicted: Tensor, batch: NoisedBatch) -> Tensor:
        """(B,), the weighted mean squared error of each sample, in fp32."""
        squares = (predicted.float() - batch.target.float()).square()
        if batch.weight.dim() > 1:
            return (squares * batch.weight).mean(dim=(1, 2, 3))
        return squares.mean(dim=(1, 2, 3)) * batch.weight

    def _weight(self, timesteps: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps))
        alphas = self._alphas[timesteps].clamp(1e-8, 1 - 1e-8)
        snr = alphas / (1 - alphas)
        clamped = snr.clamp_max(self.min_snr_gamma)
        return clamped / (snr + 1 if self.velocity else snr)


class FlowObjective(Objective):
    """Rectified flow (arXiv 2403.03206, section 2): latents and noise are mixed by sigma, and the
    velocity, noise − latents, is predicted.

    Sigma is logit-normal (its section 3.1), shifted as the scheduler shifts it for sampling.
    """

    def __init__(self, scheduler_config, noise_offset: float, min_snr_gamma: float | None):
        if min_snr_gamma is not None:
            raise ConfigError(
                "min_snr_gamma is for bases that predict noise or v, this one predicts a flow",
                "leave it out",
            )
        self.noise_offset, self.min_snr_gamma = noise_offset, None
        self._shift = scheduler_config["shift"]
        self._steps = scheduler_config["num_train_timesteps"]

    def noised(self, draw: Draw) -> NoisedBatch:
        latents, noise, timesteps, weight = draw
        sigma = self._sigma(timesteps, latents)
        noised = (1 - sigma) * latents + sigma * noise
        return NoisedBatch(noised, timesteps, noise - latents, weight)

    def explained(self, batch: NoisedBatch, predicted: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(batch.timesteps, predicted)
        return batch.noised - sigma * predicted, batch.noised + (1 - sigma) * predicted

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return (timesteps / self._steps).view(-1, 1, 1, 1).to(like)

    def _timesteps(self, count: int, generator: Generator) -> Tensor:
        """(B,), not whole: sigma in the units of the model."""
        drawn = torch.randn(count, generator=generator).sigmoid()
        return self._steps * self._shift * drawn / (1 + (self._shift - 1) * drawn)
