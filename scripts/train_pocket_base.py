"""Train the embedded base on composed scenes, on one GPU or several, in runs that resume.

    python scripts/train_pocket_base.py --autoencoder-seconds 200 --seconds 300
    torchrun --nproc-per-node 2 scripts/train_pocket_base.py --seconds 560 --decay

A run loads the state that the last one left in --state (full precision, with the optimizer) or,
without one, the half-precision model in --start; it ends after the seconds given, writes the
state, and the model with averaged weights to --out. The autoencoder is trained once, first.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from pocket_model import (
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
    save_pocket,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTokenizer
from world.stream import SceneStream, tokenize

EMA_DECAY = 0.9995
EMPTY_PROMPT_RATE = 0.1


@dataclass(frozen=True)
class Place:
    """Where this process computes: rank of how many, device, and whether it may compile."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def find(cls) -> "Place":
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            return cls(rank, world, torch.device("cpu"))
        if world > 1:
            dist.init_process_group("nccl")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return cls(rank, world, torch.device("cuda", torch.cuda.current_device()))

    def wrap(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device, memory_format=torch.channels_last)
        compiled = torch.compile(module) if self.device.type == "cuda" else module
        return DistributedDataParallel(compiled) if self.world > 1 else compiled

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


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


class Denoiser(nn.Module):
    """Text encoder and UNet together: token ids and noised latents → prediction."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noised: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noised, timesteps, self.text_encoder(ids).last_hidden_state).sample


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
        _set_rate(optimizer, 2e-3 * min(1, (step + 1) / 200) * _cosine(progress))
        pictures, _ = next(batches)
        pictures = pictures.to(memory_format=torch.channels_last)
        noise = torch.randn(len(pictures), 4, 32, 32, device=place.device)
        with torch.autocast(place.device.type, torch.bfloat16):
            loss, mse = model(pictures, noise)
        _update(optimizer, model, loss)
        step += 1
        if step % 20 == 0:
            progress = _shared(place, (time.monotonic() - start) / seconds)
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


class LatentPool:
    """Recent scenes as latents; each is used several times with fresh noise before it is replaced.

    Composing and encoding cost about as much as a training step, the reuse makes them cheap.
    """

    def __init__(self, stream: SceneStream, autoencoder: AutoencoderKL, size: int):
        self.batches = iter(stream)
        self.autoencoder = autoencoder
        on_gpu = stream.device.type == "cuda"
        self.encoder = torch.compile(autoencoder.encoder) if on_gpu else autoencoder.encoder
        self.scale = autoencoder.config.scaling_factor
        self.latents = torch.empty(size, 4, 32, 32, dtype=torch.bfloat16, device=stream.device)
        self.ids = torch.empty(size, 77, dtype=torch.long, device=stream.device)
        self.filled = self.cursor = 0

    @torch.no_grad()
    def refresh(self) -> None:
        pictures, ids = next(self.batches)
        with torch.autocast(pictures.device.type, torch.bfloat16):
            features = self.encoder(pictures.to(memory_format=torch.channels_last))
            moments = self.autoencoder.quant_conv(features)
        mean, log_variance = moments.float().chunk(2, 1)
        latents = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * torch.randn_like(mean)
        stop = min(self.cursor + len(latents), len(self.ids))
        rows = slice(self.cursor, stop)
        count = stop - self.cursor
        self.latents[rows] = (latents[:count] * self.scale).to(torch.bfloat16)
        self.ids[rows] = ids[:count]
        self.filled = max(self.filled, stop)
        self.cursor = stop % len(self.ids)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(self.filled, (batch,), device=self.ids.device)
        return self.latents[rows].float(), self.ids[rows]


def velocity_batches(
    pool: LatentPool, batch: int, empty: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless (noised, timesteps, ids, velocity target); some prompts are emptied for guidance."""
    device = pool.ids.device
    alphas = build_scheduler().alphas_cumprod.to(device)
    while True:
        latents, ids = pool.draw(batch)
        ids = torch.where(torch.rand(batch, 1, device=device) < EMPTY_PROMPT_RATE, empty, ids)
        timesteps = torch.randint(len(alphas), (batch,), device=device)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        noise = torch.randn_like(latents)
        yield signal * latents + sigma * noise, timesteps, ids, signal * noise - sigma * latents


def train_denoiser(
    args: argparse.Namespace, place: Place, pool: LatentPool, model: Denoiser, empty: Tensor
) -> tuple[Denoiser, dict]:
    """Train for `args.seconds`; returns the averaged model and what happened."""
    history = {"images": 0, "steps": 0, "losses": []}
    model.to(place.device)
    average = copy.deepcopy(model).requires_grad_(False)
    wrapped = place.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=place.device.type == "cuda")  # fmt: skip
    state_file = args.state / "denoiser.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=place.device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        history |= {"images": state["images"], "steps": state["steps"]}
        place.say(f"resumed after {history['images']:,} images")
    for _ in range(max(1, args.pool // (4 * args.fresh))):
        pool.refresh()
    batches = velocity_batches(pool, args.batch, empty)
    start, step, progress, running = time.monotonic(), 0, 0.0, 0.0
    warm_up = 300
    place.say("denoiser: pool is filled, training starts")
    while progress < 1:
        decay = min(1, (1 - progress) / 0.6) if args.decay else 1
        _set_rate(optimizer, args.rate * min(1, (step + 1) / warm_up) * decay)
        pool.refresh()
        noised, timesteps, ids, target = next(batches)
        with torch.autocast(place.device.type, torch.bfloat16):
            predicted = wrapped(noised.to(memory_format=torch.channels_last), timesteps, ids)
        loss = F.mse_loss(predicted.float(), target)
        _update(optimizer, model, loss)
        step += 1
        ema = min(EMA_DECAY, (history["steps"] + step) / (history["steps"] + step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - ema)
        if step % 20 == 0:
            running = loss.item()
            progress = _shared(place, (time.monotonic() - start) / args.seconds)
        if step % 200 == 0:
            rate = step * args.batch * place.world / (time.monotonic() - start)
            history["losses"].append([history["steps"] + step, round(running, 5)])
            place.say(f"denoiser step {step} loss {running:.4f} {rate:,.0f} images/s")
    history["steps"] += step
    history["images"] += step * args.batch * place.world
    history["seconds"] = round(time.monotonic() - start, 1)
    if place.rank == 0:
        args.state.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "average": average.state_dict(),
                 "optimizer": optimizer.state_dict()}  # fmt: skip
        state |= {key: history[key] for key in ("images", "steps")}
        torch.save(state, state_file)
    return average, history


def _update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _cosine(progress: float) -> float:
    return 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item()) + 1e-3


def _shared(place: Place, value: float) -> float:
    """Rank 0's clock decides for all, so that every process stops at the same step."""
    if place.world == 1:
        return value
    clock = torch.tensor(value, device=place.device)
    dist.broadcast(clock, 0)
    return clock.item()


def load_start(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> tuple:
    """Autoencoder and denoiser: from --start where it exists, else newly made."""
    if args.start and args.start.exists():
        pipeline = StableDiffusionPipeline.from_pretrained(args.start, torch_dtype=torch.float32)
        return pipeline.vae, Denoiser(pipeline.text_encoder, pipeline.unet)
    return build_autoencoder(), Denoiser(build_text_encoder(tokenizer), build_unet())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("build/world"))
    parser.add_argument("--tokenizer", type=Path, default=Path("sbora_diffusion/pocket/tokenizer"))
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--state", type=Path, default=Path("build/pocket_state"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket"))
    parser.add_argument("--autoencoder-seconds", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="for text encoder and UNet")
    parser.add_argument("--batch", type=int, default=512, help="per device")
    parser.add_argument("--fresh", type=int, default=192, help="new scenes per step and device")
    parser.add_argument("--pool", type=int, default=49_152)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--decay", action="store_true", help="let the rate fall to 0 in this run")
    parser.add_argument("--variants", type=int, default=250, help="drawings of each background")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    began = time.monotonic()
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    rank = int(os.environ.get("RANK", 0))
    seed = args.seed * 1000 + rank
    place = Place.find()
    torch.manual_seed(args.seed)
    autoencoder, model = load_start(args, tokenizer)
    kept = args.state / "autoencoder.pt"
    if kept.exists():
        autoencoder, scale = build_autoencoder(), torch.load(kept, weights_only=True)
        autoencoder.load_state_dict(scale["model"])
        autoencoder.register_to_config(scaling_factor=scale["scaling_factor"])
    autoencoder.to(place.device, memory_format=torch.channels_last)
    torch.manual_seed(seed)
    stream = SceneStream.open(
        args.world, tokenizer, args.fresh, seed, place.device, args.workers, args.variants
    )
    place.say(f"{place.device} ×{place.world}; world is ready after {time.monotonic() - began:.0f} s")
    if args.autoencoder_seconds:
        train_autoencoder(place, stream, args.autoencoder_seconds, autoencoder)
        if place.rank == 0:
            args.state.mkdir(parents=True, exist_ok=True)
            scale = autoencoder.config.scaling_factor
            torch.save({"model": autoencoder.state_dict(), "scaling_factor": scale}, kept)
    history: dict = {}
    if args.seconds:
        autoencoder.requires_grad_(False)
        pool = LatentPool(stream, autoencoder, args.pool)
        empty = tokenize(tokenizer, [""]).long().to(place.device)
        model, history = train_denoiser(args, place, pool, model, empty)
    if place.rank == 0:
        save_pocket(args.out, autoencoder, model.unet, model.text_encoder, tokenizer)
        history["total_seconds"] = round(time.monotonic() - began, 1)
        (args.out / "training.json").write_text(json.dumps(history, indent=1))
        place.say(f"wrote {args.out}: {history}")


if __name__ == "__main__":
    main()
