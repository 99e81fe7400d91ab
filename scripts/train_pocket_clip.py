"""Train pocket-clip, the judge, on composed scenes with the held-out subjects, in resumable runs.

    PYTHONPATH=. python scripts/train_pocket_clip.py --seconds 480 --decay
    PYTHONPATH=. torchrun --nproc-per-node 2 scripts/train_pocket_clip.py --seconds 480 --decay

A run goes on from the state that the last one left in --state (full precision, with the
optimizer), ends after the seconds given, and writes the state, the model with averaged weights
to --out, and a record of the training beside it. It shares nothing with the base but the world
and the tokenizer, and never sees the committed reference views.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from open_clip.model import CLIP
from pocket_clip_model import (
    build_clip,
    caption_ids,
    contrastive_loss,
    load_clip,
    save_clip,
)
from pocket_pictures import PicturePool, from_bytes, to_bytes
from pocket_run import Place, resume, save_state, set_rate, shared, update
from torch import Tensor, nn
from transformers import CLIPTokenizer
from world.stream import PlanDataset, SceneStream

from sbora_diffusion.evaluation.metrics import recall_at_1

EMA_DECAY = 0.999
WARM_UP = 500  # steps
LARGEST_LOGIT_SCALE = math.log(100)
FRESH_SEED = 987_654_321  # of scenes that no training run draws
GROUP = 100  # captions to choose from


@dataclass
class Training:
    """What a run changes and a state file keeps: model, its average, optimizer, counts."""

    model: CLIP
    average: CLIP
    optimizer: torch.optim.Optimizer
    steps: int = 0
    images: int = 0

    @classmethod
    def begin(cls, model: CLIP, rate: float, weight_decay: float) -> "Training":
        average = copy.deepcopy(model).requires_grad_(False).eval()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = next(model.parameters()).is_cuda
        return cls(model, average, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98),
                                                     fused=fused))  # fmt: skip

    def load(self, folder: Path) -> None:
        """Go on from what is there, if anything is."""
        models = {"model": self.model, "average": self.average}
        if found := resume(folder, models, self.optimizer):
            self.steps, self.images = int(found["steps"]), int(found["images"])

    def save(self, folder: Path) -> None:
        models = {"model": self.model, "average": self.average}
        save_state(folder, models, self.optimizer, {"steps": self.steps, "images": self.images})

    @torch.no_grad()
    def advance(self, images: int) -> None:
        """Count a step, keep the temperature in bounds, and follow with the average."""
        self.steps += 1
        self.images += images
        self.model.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)
        decay = min(EMA_DECAY, self.steps / (self.steps + 10))
        torch._foreach_lerp_(_numbers(self.average), _numbers(self.model), 1 - decay)


def _numbers(model: nn.Module) -> list[Tensor]:
    """Parameters and the statistics of batch normalisation, without its counters or masks."""
    return [t for t in model.state_dict().values() if t.is_floating_point()]


@dataclass(frozen=True)
class FreshScenes:
    """Pictures (N, 3, 128, 128) as bytes with their ids (N, L), kept apart from training."""

    pictures: Tensor
    ids: Tensor

    @classmethod
    def draw(cls, stream: SceneStream, groups: int) -> "FreshScenes":
        """Groups of plans of an own seed, composed as the stream composes them."""
        training = stream.loader.dataset
        plans = PlanDataset(training.planner, training.tokenize, GROUP, FRESH_SEED)
        pictures, ids = [], []
        for layers, background, tokens in itertools.islice(plans, groups):
            pictures.append(to_bytes(stream.composer.compose(layers, background)))
            ids.append(tokens.long().to(stream.device))
        return cls(torch.cat(pictures), torch.cat(ids))

    @torch.no_grad()
    def recall(self, model: CLIP) -> float:
        """Image→text recall@1 among `GROUP` captions, the mean over groups."""
        found = []
        for pictures, ids in zip(self.pictures.split(GROUP), self.ids.split(GROUP), strict=True):
            features = model.encode_image(from_bytes(pictures), normalize=True)
            found.append(recall_at_1(features, model.encode_text(ids, normalize=True)))
        return sum(found) / len(found)


def rate_factor(steps: int, progress: float, decay: bool) -> float:
    """Warm-up by steps; with `decay` a cosine to 0 by the share of the run that is over."""
    fall = 0.5 * (1 + math.cos(math.pi * min(1, progress))) if decay else 1
    return min(1, (steps + 1) / WARM_UP) * fall


def train(args: argparse.Namespace, place: Place, pool: PicturePool, training: Training) -> dict:
    """Train for `args.seconds`; returns what happened."""
    wrapped = place.wrap(training.model.train())
    loss_of = contrastive_loss(place.rank, place.world)
    history: dict = {"log": []}
    first, progress, start = training.steps, 0.0, time.monotonic()
    while progress < 1:
        factor = rate_factor(training.steps, progress, args.decay)
        set_rate(training.optimizer, args.rate * factor)
        pool.refresh()
        pictures, ids = pool.draw(args.batch)
        with torch.autocast(place.device.type, torch.bfloat16):
            seen, read, scale = wrapped(pictures.to(memory_format=torch.channels_last), ids)
        seen, read = seen.float(), read.float()
        loss = loss_of(seen, read, scale.float())
        update(training.optimizer, training.model, loss)
        training.advance(args.batch * place.world)
        done = training.steps - first
        if done % args.check == 0:
            progress = shared(place, (time.monotonic() - start) / args.seconds)
        if done % args.log == 0:
            entry = {"step": training.steps, "loss": round(loss.item(), 4),
                     "batch_recall": round(recall_at_1(seen.detach(), read.detach()), 4),
                     "scale": round(scale.item(), 2)}  # fmt: skip
            history["log"].append(entry)
            speed = done * args.batch * place.world / (time.monotonic() - start)
            place.say(f"{entry} {speed:,.0f} images/s")
    return history | {"seconds": round(time.monotonic() - start, 1)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("build/world"))
    parser.add_argument("--tokenizer", type=Path, default=Path("sbora_diffusion/pocket/tokenizer"))
    parser.add_argument("--state", type=Path, default=Path("build/pocket_clip_state"))
    parser.add_argument("--out", type=Path, default=Path("build/pocket_clip/clip"))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--batch", type=int, default=1024, help="per device")
    parser.add_argument("--fresh", type=int, default=344, help="new scenes per step and device")
    parser.add_argument("--pool", type=int, default=61_440)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--decay", action="store_true", help="let the rate fall to 0 in this run")
    parser.add_argument("--variants", type=int, default=250, help="drawings of each background")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--check", type=int, default=20, help="steps between looks at the clock")
    parser.add_argument("--log", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--groups", type=int, default=20, help="of 100 fresh scenes, at the end")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    began = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    place = Place.find()
    torch.manual_seed(args.seed)
    training = Training.begin(build_clip(tokenizer).to(place.device), args.rate, args.weight_decay)
    training.load(args.state / "clip")
    if training.steps:
        place.say(f"resumed after {training.images:,} images")
    seed = 1000 * (args.seed + training.steps) + place.rank
    generator = torch.Generator(place.device).manual_seed(seed)
    stream = SceneStream.open(
        args.world, functools.partial(caption_ids, tokenizer), args.fresh, seed, place.device,
        args.workers, args.variants, judge=True,
    )  # fmt: skip
    pool = PicturePool(stream, args.pool, generator)
    for _ in range(args.pool // (4 * args.fresh)):
        pool.refresh()
    place.say(f"{place.device} ×{place.world}; pool after {time.monotonic() - began:.0f} s")
    history = train(args, place, pool, training)
    history["total_seconds"] = round(time.monotonic() - began, 1)
    if place.rank == 0:
        finish(args, training, tokenizer, stream, history)
        place.say(f"wrote {args.out}: {history}")


def finish(args: argparse.Namespace, training: Training, tokenizer: CLIPTokenizer,
           stream: SceneStream, history: dict) -> None:  # fmt: skip
    """Write state and model, then judge the model as it was written, and write the record."""
    training.save(args.state / "clip")
    save_clip(args.out, training.average, tokenizer)
    history |= {"steps": training.steps, "images": training.images}
    fresh = FreshScenes.draw(stream, args.groups)
    history["recall_at_1"] = round(fresh.recall(load_clip(args.out, stream.device)), 4)
    (args.out.parent / "training.json").write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    main()
