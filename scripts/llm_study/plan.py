"""What is trained and tested: runs, their settings, and what tells their lines apart."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sbora_diffusion.core.llm.config import LlmConfig
from sbora_diffusion.core.llm.shapes import FIVE, LINEARS

METHODS = ("lora", "dora", "sbora-fa", "sbora-fb")
RANKS = (32, 64)
QUANTIZED_RANK = 64
SEEDS = (0, 1)
GENERATED = 4000
"""Word problems beside GSM8K's, with the seed of the training set."""
DATA_SEED = 0

GROUPS: dict[str, dict[str, Any]] = {
    "commonsense": {
        "train": ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge"),
        "test": (
            "boolq", "piqa", "social_i_qa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
        ),
        "epochs": 1.0,
        "new_tokens": 16,
    },
    "arithmetic": {
        "train": ("gsm8k",),
        "test": ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP"),
        "epochs": 2.0,
        "new_tokens": 160,
    },
}  # fmt: skip
"""Hellaswag's questions are not at hand, nor its training set and those of three other tasks."""

RATE = 1e-3
"""Of all methods, as in the paper; higher than its 2e-4 and 3e-4, for a model fifty times smaller
and batches four to eight times larger."""


@dataclass(frozen=True)
class Run:
    """One training and its tests, or with the method "base" the tests alone.

    Attributes:
        quantize: "none" or "nf4", with double quantization.
    """

    group: str
    method: str
    rank: int = 0
    quantize: str = "none"
    seed: int = 0
    rate: float = RATE

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())

    @property
    def title(self) -> str:
        return " ".join(str(part) for part in self.key if part not in ("none", 0))


def runs(rate: float = RATE, seeds: tuple[int, ...] = SEEDS) -> Iterator[Run]:
    """All runs, in an order in which one that is broken off leaves whole seeds."""
    for group in GROUPS:
        yield Run(group, "base", rate=0.0)
    for seed in seeds:
        for group in GROUPS:
            yield from adapters(group, seed, rate)


def adapters(group: str, seed: int, rate: float) -> Iterator[Run]:
    """The trainings of one group of tasks and one seed."""
    for method in METHODS:
        for rank in RANKS:
            yield Run(group, method, rank, "none", seed, rate)
        yield Run(group, method, QUANTIZED_RANK, "nf4", seed, rate)


def config_of(run: Run, **changes: Any) -> LlmConfig:
    """The paper's settings, with larger batches: alpha 2r, dropout and five targets on a 16-bit
    base; alpha 16, no dropout and all seven targets on NF4."""
    quantized = run.quantize == "nf4"
    settings = {
        "method": run.method,
        "rank": run.rank,
        "alpha": 16.0 if quantized else 2.0 * run.rank,
        "dropout": 0.0 if quantized else 0.05,
        "targets": LINEARS if quantized else FIVE,
        "dtype": "bf16",
        "quantize": run.quantize,
        "double_quant": quantized,
        "epochs": GROUPS[run.group]["epochs"],
        "batch_size": 64,
        "micro_batch_size": 64,
        "rate": run.rate,
        "warmup": 10,
        "seed": run.seed,
    }
    return LlmConfig(**{**settings, **changes})
