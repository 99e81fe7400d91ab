"""What a training step's time goes into on a CPU, for the goals of speed that are not met there.

    python scripts/profile_speed.py

Writes results/speed_profile.json and the tables of docs/speed_profile.md. Shares are those of
torch's profiler, whose own cost is taken out by scaling them to the time without it.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study_options import with_tables
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sbora_diffusion.bench.contestants import Contestant, contestant
from sbora_diffusion.bench.methods import METHODS, Site
from sbora_diffusion.bench.settings import FLOOR
from sbora_diffusion.bench.shapes import SHAPES, Shape, layer_shape, random_inputs, random_model
from sbora_diffusion.records import run_of

COMPARED = (FLOOR, "sbora_fa_folded", "sbora_fb_folded", "lora")
OPTIMIZER, WRITE_BACK, REST = "AdamW", "write-back", "Python between the operations"
OTHER = "other operations"
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "convolutions": ("mkldnn_convolution", "convolution_backward", "slow_conv2d"),
    "attention": ("flash_attention",),
    "gathers": ("index_select", "index", "gather"),
    "normalisation, activations": ("norm", "silu", "gelu"),
    "copies and sums": ("copy_", "add", "add_", "cat", "clone", "sum", "mul", "fill_"),
}
"""Kind → the whole name of an operation, or a part of a long one."""


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    for kind, names in KINDS.items():
        if any(name == one or ("_" in name and len(one) > 3 and one in name) for one in names):
            return kind
    return OTHER


class Timed:
    """Steps of one method."""

    def __init__(self, step: Callable[[], None], of_rounds: int):
        self.step, self.of_rounds = step, of_rounds

    def milliseconds(self) -> float:
        began = time.perf_counter()
        self.step()
        return 1000 * (time.perf_counter() - began)

    def shares(self) -> dict[str, float]:
        """Kind → share of the time."""
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(self.of_rounds):
                self.step()
        total = 1e6 * (time.perf_counter() - began)
        found: defaultdict[str, float] = defaultdict(float)
        for event in seen.events():
            found[_within(event) or kind_of(event.name)] += event.self_cpu_time_total
        # What a recorded range does between its operations is Python's.
        found[REST] = max(0.0, total - sum(found.values()))
        whole = sum(found.values())
        return {kind: spent / whole for kind, spent in found.items()}


def _within(event: Any) -> str | None:
    """The optimizer, or the write-back, if the event belongs to it."""
    while event is not None:
        if event.name.startswith("Optimizer.step"):
            return OPTIMIZER
        if event.name == WRITE_BACK:
            return WRITE_BACK
        event = event.cpu_parent
    return None


def profiled(shape: Shape, batch: int, whole: bool, rounds: int) -> dict[str, Any]:
    """Method → milliseconds and what they go into, each on a twin of one model.

    Args:
        whole: with optimizer and write-back.
    """
    base = random_model(shape, "cpu", torch.float32, 0)
    inputs = random_inputs(shape, batch, "cpu", torch.float32, 0)
    layers, found = shape.targets(base), {}
    with ExitStack() as stack:  # when it closes, folded layers become two paths

        def site(model: nn.Module) -> Site:
            return Site(model, layers, shape.rank, stack)

        for method in COMPARED:
            one = contestant(base, method, site)
            one.set_inputs(inputs)
            _name_write_back(one)
            found[method] = Timed(one.step if whole else partial(_passes, one), rounds)
        return measured(found, rounds)


def _name_write_back(one: Contestant) -> None:
    after = one.adapter.after
    if after is None:
        return

    def named() -> None:
        with record_function(WRITE_BACK):
            after()

    object.__setattr__(one.adapter, "after", named)


def _passes(one: Contestant) -> None:
    one.passes()
    one.forget()


def measured(found: Mapping[str, Timed], rounds: int) -> dict[str, Any]:
    """See `profiled`; the methods take turns."""
    for timed in [*found.values()] * 3:
        timed.step()
    times = [{name: timed.milliseconds() for name, timed in found.items()} for _ in range(rounds)]
    result = {}
    for name, timed in found.items():
        median = statistics.median(row[name] for row in times)
        ratio = statistics.median(row[name] / row[FLOOR] for row in times)
        parts = {kind: round(median * share, 3) for kind, share in timed.shares().items()}
        result[name] = {"ms": round(median, 3), "over_frozen": round(ratio, 4), "parts": parts}
    return result


def tables(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name → lines of Markdown, for the page."""
    where = (
        f"{record['device']} ({record['date']}, commit {record['commit']}, torch "
        f"{record['versions']['torch']}): `{record['command']}`. Milliseconds; medians of "
        "interleaved rounds, split by the shares of torch's profiler."
    )
    lines = [where]
    for title, methods in record["profiles"].items():
        lines += ["", f"**{title}**", "", *_table(methods)]
    return {"profiles": lines}


def _table(methods: Mapping[str, Any]) -> list[str]:
    kinds = {kind for one in methods.values() for kind in one["parts"]}
    by_size = sorted(kinds, key=lambda kind: (-methods[FLOOR]["parts"].get(kind, 0.0), kind))
    rows = {"all": [one["ms"] for one in methods.values()]}
    rows["over the frozen model"] = [one["over_frozen"] for one in methods.values()]
    rows |= {kind: [one["parts"].get(kind, 0.0) for one in methods.values()] for kind in by_size}
    names = [METHODS[name].title for name in methods]
    head = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    return head + [f"| {k} | {' | '.join(f'{v:.3f}' for v in row)} |" for k, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=Path("results/speed_profile.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/speed_profile.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began, layer, pocket = time.perf_counter(), layer_shape(320, 4096), SHAPES["pocket"]
    profiles = {
        f"{layer.title}, rank {layer.rank}: forward and backward pass": profiled(
            layer, 1, False, 4 * args.rounds
        ),
        f"{pocket.title}, batch 4, rank {pocket.rank}: training step": profiled(
            pocket, 4, True, args.rounds
        ),
    }
    command = shlex.join(["python", *sys.argv])
    run = run_of(command, "cpu", time.perf_counter() - began, None)
    record = {
        "what": "where a CPU's time goes",
        **run,
        "threads": args.threads,
        "profiles": profiles,
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(with_tables(page, tables(record)), encoding="utf-8")


if __name__ == "__main__":
    main()
