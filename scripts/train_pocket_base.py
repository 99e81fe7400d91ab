"""Train the embedded base on composed scenes, on one GPU or several, in runs that resume.

    python scripts/train_pocket_base.py --autoencoder-seconds 200 --seconds 300
    torchrun --nproc-per-node 2 scripts/train_pocket_base.py --seconds 560 --decay

A run loads the state that the last one left in --state (full precision, with the optimizer) or,
without one, the half-precision model in --base; it ends after the seconds given, writes the
state, and the model with averaged weights to --out. The autoencoder is trained once, first, and
comes from --state or --base ever after.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from pocket_autoencoder import train_autoencoder
from pocket_model import (
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
    save_pocket,
)
from pocket_run import Place, resume, save_state, set_rate, shared, update
from torch import Tensor, nn
from transformers import CLIPTokenizer
from world.stream import PipelineTokenize, SceneStream

EMA_DECAY = 0.999
EMPTY_PROMPT_RATE = 0.1
LOGIT_MEAN, EVEN_SHARE = -0.4, 0.15  # of the timesteps


class Denoiser(nn.Module):
    """Text encoder and UNet together: token ids and noised latents → prediction."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noised: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noised, timesteps, self.text_encoder(ids).last_hidden_state).sample


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


def draw_timesteps(count: int, most: int, device: torch.device) -> Tensor:
    """Logit-normal (arXiv 2403.03206, section 3.1) around 40 % of the way, some of them even.

    There outlines and parts are decided; most of an even draw is spent where only the mean shows.
    """
    normal = torch.sigmoid(torch.randn(count, device=device) + LOGIT_MEAN)
    even = torch.rand(count, device=device)
    share = torch.where(torch.rand(count, device=device) < EVEN_SHARE, even, normal)
    return (share * most).long().clamp(max=most - 1)


def velocity_batches(
    pool: LatentPool, batch: int, empty: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless (noised, timesteps, ids, velocity target); some prompts are emptied for guidance."""
    device = pool.ids.device
    alphas = build_scheduler().alphas_cumprod.to(device)
    while True:
        latents, ids = pool.draw(batch)
        ids = torch.where(torch.rand(batch, 1, device=device) < EMPTY_PROMPT_RATE, empty, ids)
        timesteps = draw_timesteps(batch, len(alphas), device)
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
    models, folder = {"model": model, "average": average}, args.state / "denoiser"
    if found := resume(folder, models, optimizer):
        history |= {key: int(value) for key, value in found.items()}
        place.say(f"resumed after {history['images']:,} images")
    for _ in range(max(1, args.pool // (4 * args.fresh))):
        pool.refresh()
    batches = velocity_batches(pool, args.batch, empty)
    start, step, progress, running = time.monotonic(), 0, 0.0, 0.0
    warm_up = 300
    place.say("denoiser: pool is filled, training starts")
    while progress < 1:
        decay = min(1, (1 - progress) / 0.6) if args.decay else 1
        set_rate(optimizer, args.rate * min(1, (step + 1) / warm_up) * decay)
        pool.refresh()
        noised, timesteps, ids, target = next(batches)
        with torch.autocast(place.device.type, torch.bfloat16):
            predicted = wrapped(noised.to(memory_format=torch.channels_last), timesteps, ids)
        loss = F.mse_loss(predicted.float(), target)
        update(optimizer, model, loss)
        step += 1
        ema = min(EMA_DECAY, (history["steps"] + step) / (history["steps"] + step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - ema)
        if step % 20 == 0:
            running = loss.item()
            progress = shared(place, (time.monotonic() - start) / args.seconds)
        if step % 200 == 0:
            rate = step * args.batch * place.world / (time.monotonic() - start)
            history["losses"].append([history["steps"] + step, round(running, 5)])
            place.say(f"denoiser step {step} loss {running:.4f} {rate:,.0f} images/s")
    history["steps"] += step
    history["images"] += step * args.batch * place.world
    history["seconds"] = round(time.monotonic() - start, 1)
    if place.rank == 0:
        counts = {key: history[key] for key in ("images", "steps")}
        save_state(folder, models, optimizer, counts)
    return average, history


def load_start(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> tuple:
    """Autoencoder and denoiser: from --base where it is given, else newly made."""
    trained = args.base or (args.state / "autoencoder").exists() or args.autoencoder_seconds
    assert trained or not args.seconds, "no trained autoencoder: give --base"
    if args.base:
        pipeline = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.float32)
        return pipeline.vae, Denoiser(pipeline.text_encoder, pipeline.unet)
    return build_autoencoder(), Denoiser(build_text_encoder(tokenizer), build_unet())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("build/world"))
    parser.add_argument("--tokenizer", type=Path, default=Path("sbora_diffusion/pocket/tokenizer"))
    parser.add_argument("--base", type=Path, help="model folder to go on from")
    parser.add_argument("--state", type=Path, default=Path("build/pocket_state"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket"))
    parser.add_argument("--autoencoder-seconds", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="for text encoder and UNet")
    parser.add_argument("--batch", type=int, default=512, help="per device")
    parser.add_argument("--fresh", type=int, default=96, help="new scenes per step and device")
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
    kept = args.state / "autoencoder"
    if kept.exists():
        autoencoder = build_autoencoder()
        found = resume(kept, {"model": autoencoder})
        autoencoder.register_to_config(scaling_factor=found["scaling_factor"])
    autoencoder.to(place.device, memory_format=torch.channels_last)
    torch.manual_seed(seed)
    tokenize = PipelineTokenize(tokenizer)
    stream = SceneStream.open(
        args.world, tokenize, args.fresh, seed, place.device, args.workers, args.variants
    )
    place.say(
        f"{place.device} ×{place.world}; world is ready after {time.monotonic() - began:.0f} s"
    )
    if args.autoencoder_seconds:
        train_autoencoder(place, stream, args.autoencoder_seconds, autoencoder)
        if place.rank == 0:
            scale = autoencoder.config.scaling_factor
            save_state(kept, {"model": autoencoder}, None, {"scaling_factor": scale})
    history: dict = {}
    if args.seconds:
        autoencoder.requires_grad_(False)
        pool = LatentPool(stream, autoencoder, args.pool)
        empty = tokenize([""]).long().to(place.device)
        model, history = train_denoiser(args, place, pool, model, empty)
    if place.rank == 0:
        save_pocket(args.out, autoencoder, model.unet, model.text_encoder, tokenizer)
        history["total_seconds"] = round(time.monotonic() - began, 1)
        (args.out / "training.json").write_text(json.dumps(history, indent=1))
        place.say(f"wrote {args.out}: {history}")


if __name__ == "__main__":
    main()
