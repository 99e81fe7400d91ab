"""An endless stream of composed scenes with token ids, on the training device."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTokenizer

from world.compose import Composer
from world.plans import ScenePlanner
from world.sprites import SpriteBank

Tokenize = Callable[[list[str]], Tensor]


class PlanDataset(IterableDataset):
    """Batches of (layers, background, input_ids); every worker draws from its own seed."""

    def __init__(self, planner: ScenePlanner, tokenize: Tokenize, batch: int, seed: int):
        self.planner, self.tokenize, self.batch, self.seed = planner, tokenize, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            plans = [self.planner.plan(rng) for _ in range(self.batch)]
            yield (
                torch.from_numpy(np.stack([p.layers for p in plans])),
                torch.from_numpy(np.stack([p.background for p in plans])),
                self.tokenize([p.caption for p in plans]),
            )


@dataclass(frozen=True)
class PipelineTokenize:
    """Captions → token ids (B, 77) int16, padded and truncated as the pipeline does it."""

    tokenizer: CLIPTokenizer

    def __call__(self, captions: list[str]) -> Tensor:
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded.input_ids.short()


@dataclass
class SceneStream:
    """Yields (pictures (B, 3, 128, 128) in [−1, 1], input_ids (B, 77)) on `device`."""

    composer: Composer
    loader: DataLoader
    device: torch.device

    @classmethod
    def open(
        cls,
        world: Path,
        tokenize: Tokenize,
        batch: int,
        seed: int,
        device: torch.device,
        workers: int,
        variants: int,
        judge: bool = False,
    ) -> "SceneStream":
        """Args: `variants`, drawings of each background; `judge`, with the held-out subjects."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bank = SpriteBank.load(world, held_out=judge)
        planner = ScenePlanner(bank.sprites, variants)
        plans = PlanDataset(planner, tokenize, batch, seed)
        loader = DataLoader(
            plans, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        return cls(Composer(bank, planner, seed, device), loader, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for layers, background, ids in self.loader:
            pictures = self.composer.compose(layers, background)
            yield pictures, ids.to(self.device, non_blocking=True).long()
