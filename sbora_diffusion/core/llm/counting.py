"""Trained parameters: of any model and method, and of every row of the paper's language tables.

Models are built from their public configurations without memory for their weights, and adapters
are put in as for a training, so that a count is what an optimizer would change. The formulas that
the paper's cells follow are below for the check: per layer, with O the sum of the outputs of all
targets and I of their inputs, LoRA r·(O + I), DoRA O more, SBoRA-FA r·O, SBoRA-FB r·I.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig

from sbora_diffusion.core.llm.methods import Adapter, adapted, trained_parameters
from sbora_diffusion.core.llm.shapes import (
    FIVE,
    LINEARS,
    check_targets,
    config_of,
    default_targets,
    meta_model,
)

TABLES = Path(__file__).with_name("paper.toml")

Verdict = Literal["match", "misprint", "mismatch"]
METHODS = {"LoRA": "lora", "DoRA": "dora", "SBoRA-FA": "sbora-fa", "SBoRA-FB": "sbora-fb"}
MODELS = {"LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "LLaMA3-8B": "llama3-8b"}


@dataclass(frozen=True)
class Cell:
    """One entry of a column of trained parameters.

    Attributes:
        table: "commonsense", "arithmetic" or "mmlu".
        source: "paper" or "README", which differ in places.
        printed: in millions, as a text.
        paper: what the paper prints there.
    """

    table: str
    source: str
    model: str
    method: str
    rank: int
    printed: str
    paper: str

    @property
    def quantized(self) -> bool:
        """Rows of the 4-bit table: all seven linear layers are adapted."""
        return self.table == "mmlu"


@dataclass(frozen=True)
class Judged:
    """A cell, the count, and how they compare."""

    cell: Cell
    count: int
    verdict: Verdict
    why: str = ""


def paper_tables() -> dict[str, Any]:
    """The three language tables, as printed."""
    return tomllib.loads(TABLES.read_text(encoding="utf-8"))


def cells() -> Iterator[Cell]:
    """Every cell of trained parameters that the paper or its README prints."""
    for table, content in paper_tables().items():
        for row in content["rows"]:
            rank = row.get("rank", 64)
            named = row["model"], row["method"].removeprefix("Q"), rank
            for source in ("paper", "README"):
                yield Cell(table, source, *named, row.get(source, row["paper"]), row["paper"])


def judged_cells() -> Iterator[Judged]:
    """All cells beside their counts."""
    for cell in cells():
        yield judge(cell, count_cell(cell))


def judge(cell: Cell, count: int) -> Judged:
    """Compare a cell with its count."""
    if _says(cell.printed, count):
        return Judged(cell, count, "match")
    if cell.quantized and _says(cell.printed, count / 2):
        why = (
            "half of the true number at the stated rank 64: the training code that the table comes "
            "from divides the count by two for 4-bit models"
        )
        return Judged(cell, count, "misprint", why)
    if cell.source == "README" and _says(cell.paper, count):
        why = f"the paper prints {cell.paper}, which the formula gives"
        return Judged(cell, count, "misprint", why)
    return Judged(cell, count, "mismatch", "no known reason")


def count_cell(cell: Cell) -> int:
    """The count that a cell should show."""
    targets = LINEARS if cell.quantized else FIVE
    return count(MODELS[cell.model], METHODS[cell.method], cell.rank, targets)


@dataclass(frozen=True)
class Counted:
    """Trained parameters beside the base's own."""

    targets: tuple[str, ...]
    trained: int
    total: int


def count_in(
    config: PretrainedConfig, method: str, rank: int, targets: tuple[str, ...] = ()
) -> Counted:
    """Trained parameters of a method in any model.

    Raises:
        ConfigError: the method or a target is unknown.
    """
    base = meta_model(config)
    targets = check_targets(base, targets) if targets else default_targets(base)
    total = sum(p.numel() for p in base.parameters())
    return Counted(targets, _count(base, method, rank, targets), total)


@dataclass(frozen=True)
class WrongAverage:
    """A row whose printed average is not that of its scores."""

    place: str
    printed: float
    average: float


def wrong_averages() -> list[WrongAverage]:
    """Rows whose average is off by more than the rounding of eight scores to one decimal."""
    found = []
    for content in paper_tables().values():
        for row in content["rows"]:
            average = sum(row["scores"]) / len(row["scores"])
            if abs(row.get("average", average) - average) > 0.1:
                place = f"{content['title']}, {row['model']} {row['method']}, rank {row['rank']},"
                found.append(WrongAverage(place, row["average"], round(average, 2)))
    return found


@cache  # the tables repeat themselves
def count(model: str, method: str, rank: int, targets: tuple[str, ...]) -> int:
    """Trained parameters of a method in one of the paper's models."""
    return _count(_base(model), method, rank, targets)


def formula(model: str, method: str, rank: int, targets: tuple[str, ...]) -> int:
    """The same from the shapes alone, for the four methods of the paper."""
    layers = [m for n, m in _base(model).named_modules() if n.rpartition(".")[2] in targets]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    both = rank * (outputs + inputs)
    return {
        "lora": both,
        "dora": both + outputs,
        "sbora-fa": rank * outputs,
        "sbora-fb": rank * inputs,
    }[method]


def _count(base: nn.Module, method: str, rank: int, targets: tuple[str, ...]) -> int:
    base.requires_grad_(False)
    with torch.device("meta"):
        wrapped = adapted(base, Adapter(method, rank, float(rank), 0.0, targets))
    counted = trained_parameters(wrapped)
    if not wrapped.active_peft_config.is_prompt_learning:
        wrapped.unload()
    return counted


@cache
def _base(model: str) -> nn.Module:
    return meta_model(config_of(model))


def _says(printed: str, count: float) -> bool:
    """Whether a cell such as "56.1M" is a count, rounded or cut off to its digits."""
    digits = printed.removesuffix("M")
    decimals = len(digits.partition(".")[2])
    low, unit = float(digits), 10.0**-decimals
    return low - unit / 2 <= count / 1e6 < low + unit
