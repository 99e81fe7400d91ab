"""The pocket base's autoencoder: loss and training."""

import time

import torch
from diffusers import AutoencoderKL
from pocket_run import Place, set_rate, shared, update
from torch import Tensor, nn
from world.stream import SceneStream


class AutoencoderLoss(nn.Module):
    """Reconstruction loss in one module, so that forward and backward compile together."""

    def __init__(self, autoencoder: AutoencoderKL, kl_weight: float = 1e-6):
        super().__init__()
        self.autoencoder, self.kl_weight = autoencoder, kl_weight

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.autoencoder.encode(pictures).latent_dist
        latents = moments.mean + moments.std * noise
        out = self.autoencoder.decode(latents).sample.float()
        error = out - pictures
        edges = sum(torch.diff(error, dim=d).abs().mean() for d in (2, 3))
        kl = moments.kl().mean() / latents[0].numel()
        mse = error.square().mean()
        return error.abs().mean() + edges + mse + self.kl_weight * kl, mse.detach()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [−1, 1]."""
    return 10 * torch.log10(torch.tensor(4 / mse)).item()


def train_autoencoder(
    place: Place, stream: SceneStream, seconds: float, autoencoder: AutoencoderKL
) -> None:
    """Train for `seconds` (compilation included) and set the latent scaling factor."""
    model = place.wrap(AutoencoderLoss(autoencoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-3)
    batches, start, step = iter(stream), time.monotonic(), 0
    progress = 0.0
    while progress < 1:
        set_rate(optimizer, 2e-3 * min(1, (step + 1) / 200) * _cosine(progress))
        pictures, _ = next(batches)
        pictures = pictures.to(memory_format=torch.channels_last)
        noise = torch.randn(len(pictures), 4, 32, 32, device=place.device)
        with torch.autocast(place.device.type, torch.bfloat16):
            loss, mse = model(pictures, noise)
        update(optimizer, model, loss)
        step += 1
        if step % 20 == 0:
            progress = shared(place, (time.monotonic() - start) / seconds)
        if step % 400 == 0:
            place.say(f"autoencoder step {step} loss {loss.item():.4f} psnr {psnr(mse.item()):.2f}")
    latents = torch.cat([_encode(autoencoder, next(batches)[0]) for _ in range(8)])
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    place.say(f"autoencoder: {step} steps, scaling factor {autoencoder.config.scaling_factor}")


@torch.no_grad()
def _encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    with torch.autocast(pictures.device.type, torch.bfloat16):
        moments = autoencoder.encode(pictures).latent_dist
    return (moments.mean + moments.std * torch.randn_like(moments.mean)).float()


def _cosine(progress: float) -> float:
    return 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item()) + 1e-3
