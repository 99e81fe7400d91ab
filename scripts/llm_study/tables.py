"""The study's tables, in the form of the paper's and beside them."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from llm_study.plan import GROUPS, METHODS, QUANTIZED_RANK, RANKS
from sbora_diffusion.core.llm.counting import paper_tables
from sbora_diffusion.core.llm.tasks import TASKS
from sbora_diffusion.pages import table

Line = dict[str, Any]
TITLES = {"lora": "LoRA", "dora": "DoRA", "sbora-fa": "SBoRA-FA", "sbora-fb": "SBoRA-FB"}
ROWS = [
    *((method, rank, "none") for rank in RANKS for method in METHODS),
    *((method, QUANTIZED_RANK, "nf4") for method in METHODS),
]


def tables(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Name → a table's lines."""
    return {**{group: scores(group, lines) for group in GROUPS}, "costs": costs(lines)}


def scores(group: str, lines: Sequence[Line]) -> list[str]:
    """Accuracy in percent, the mean over seeds ± standard deviation of the average; in brackets the
    paper's figures for LLaMA-7B. Contaminated sets are marked with a star."""
    tasks = GROUPS[group]["test"]
    head = ["method", "r", *(f"{name}{'*' if TASKS[name].contaminated else ''}" for name in tasks)]
    clean = [name for name in tasks if not TASKS[name].contaminated]
    average = "average" if len(clean) == len(tasks) else "average without *"
    rows = []
    base = _of(lines, "accuracy", group, "base", 0, "none")
    if base:
        rows.append(["base, untrained", "", *_cells(base, tasks, {}), _average(base, clean, None)])
    for method, rank, quantize in ROWS:
        found = _of(lines, "accuracy", group, method, rank, quantize)
        if found:
            printed = _printed(group, method, rank) if quantize == "none" else {}
            name = f"Q{TITLES[method]}" if quantize == "nf4" else TITLES[method]
            paper = mean(printed[t] for t in clean) if printed else None
            cells = [*_cells(found, tasks, printed), _average(found, clean, paper)]
            rows.append([name, str(rank), *cells])
    return table([*head, average], rows)


def costs(lines: Sequence[Line]) -> list[str]:
    """Trained parameters, step time and memory of each method, alone on the device."""
    head = ["method", "r", "base", "trained", "ms a step", "against LoRA", "peak, GiB"]
    rows = []
    for method, rank, quantize in ROWS:
        found = _of(lines, "speed", "commonsense", method, rank, quantize)
        peer = _of(lines, "speed", "commonsense", "lora", rank, quantize)
        if found and peer:
            step, other = (_step(some) for some in (found, peer))
            trained = f"{found[0]['trained_parameters']:,}"
            peak = f"{found[0]['peak_bytes'] / 2**30:.2f}"
            base = "NF4" if quantize == "nf4" else "bf16"
            named = [TITLES[method], str(rank), base, trained]
            rows.append([*named, f"{1000 * step:.0f}", f"{step / other:.2f}", peak])
    return table(head, rows)


def _of(
    lines: Iterable[Line], kind: str, group: str, method: str, rank: int, quantize: str
) -> list[Line]:
    wanted = (kind, group, method, rank, quantize)
    keys = ("kind", "group", "method", "rank", "quantize")
    return [line for line in lines if tuple(line[key] for key in keys) == wanted]


def _cells(found: list[Line], tasks: Sequence[str], printed: dict[str, float]) -> list[str]:
    cells = []
    for task in tasks:
        value = f"{100 * mean(_accuracy(line, task) for line in found):.1f}"
        cells.append(f"{value} ({printed[task]})" if printed else value)
    return cells


def _average(found: list[Line], tasks: Sequence[str], paper: float | None) -> str:
    each = [100 * mean(_accuracy(line, task) for task in tasks) for line in found]
    spread = f" ± {stdev(each):.1f}" if len(each) > 1 else ""
    beside = f" ({paper:.1f})" if paper is not None else ""
    return f"{mean(each):.1f}{spread}{beside}"


def _accuracy(line: Line, task: str) -> float:
    return line["tasks"][task]["right"] / line["tasks"][task]["total"]


def _step(found: list[Line]) -> float:
    return mean(line["seconds"] / line["steps"] for line in found)


def _printed(group: str, method: str, rank: int) -> dict[str, float]:
    """The paper's scores of LLaMA-7B."""
    content = paper_tables()[group]
    for row in content["rows"]:
        if (row["model"], row["method"], row["rank"]) == ("LLaMA-7B", TITLES[method], rank):
            return dict(zip(content["tasks"], row["scores"], strict=True))
    return {}
