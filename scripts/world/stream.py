"""An endless stream of composed scenes with token ids, on the training device."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTokenizer

from world.compose import Composer, ScenePlanner, SpriteBank


class PlanDataset(IterableDataset):
    """Batches of (layers, background, input_ids); every worker draws from its own seed."""

    def __init__(self, planner: ScenePlanner, tokenizer: CLIPTokenizer, batch: int, seed: int):
        self.planner, self.tokenizer, self.batch, self.seed = planner, tokenizer, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            plans = [self.planner.plan(rng) for _ in range(self.batch)]
            yield (
                torch.from_numpy(np.stack([p.layers for p in plans])),
                torch.from_numpy(np.stack([p.background for p in plans])),
                tokenize(self.tokenizer, [p.caption for p in plans]),
            )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (B, 77), padded and truncated as the pipeline does it."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
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
        tokenizer: CLIPTokenizer,
        batch: int,
        seed: int,
        device: torch.device,
        workers: int,
        variants: int,
    ) -> "SceneStream":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        bank = SpriteBank.load(world)
        planner = ScenePlanner(bank.sprites, variants)
        plans = PlanDataset(planner, tokenizer, batch, seed)
        loader = DataLoader(
            plans, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        return cls(Composer(bank, planner, seed, device), loader, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for layers, background, ids in self.loader:
            pictures = self.composer.compose(layers, background)
            yield pictures, ids.to(self.device, non_blocking=True).long()
