"""How long folding, removing, switching and merging take at the sizes of Stable Diffusion 1.5.

    OMP_NUM_THREADS=2 python scripts/benchmark_merging.py        # → results/merge_speed.json

Medians over repetitions on the CPU, SBoRA-FA of rank 8 on all 176 attention linears, placeholder
tokens included. Reading files and hashing the base (once when it is loaded) are not.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.targets import target_layers
from scripts.pocket_evaluation.record import at_most, run_of
from scripts.sd15_standin import standin, standin_concept

WHAT = "time to fold, remove, switch and merge concepts in a model of Stable Diffusion 1.5's sizes"
ONE_LIMIT, ALL_LIMIT = 0.1, 1.0  # seconds
CONCEPTS, RANK, THREADS = 14, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/merge_speed.json"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    base, concepts = _model()
    figures = {
        variant: _measure(base, [c for c in concepts if c.meta.variant == variant], options.repeats)
        for variant in ("fa", "fb")
    }
    seconds = time.perf_counter() - began
    run = run_of("python scripts/benchmark_merging.py", "cpu", seconds, options.commit)
    about = {"unit": "seconds", "rank": RANK, "layers": 176, "repeats": options.repeats}
    record = {"what": WHAT, **run, **about, **figures}
    options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(figures, indent=1))


def _model() -> tuple[Base, list[Concept]]:
    pipeline = standin(torch.Generator().manual_seed(0))
    base = Base("stand-in", pipeline, "sd1")
    layers = target_layers(pipeline)
    # Hashing the base is a part of loading it: give the concepts' own fingerprint at once.
    base.__dict__["fingerprint"] = dict.fromkeys(layers, "0" * 48)
    concepts = [
        standin_concept(layers, f"{variant}{slot}", variant, slot, RANK)
        for variant in ("fa", "fb")
        for slot in range(CONCEPTS)
    ]
    return base, concepts


def _measure(base: Base, concepts: list[Concept], repeats: int) -> dict[str, Any]:
    every = [(concept, 1.0) for concept in concepts]
    merged = Merged(base)
    merged.switch(every[:1])  # copies the word embeddings, once
    merged.restore()

    def switch(pairs: list) -> Callable[[], None]:
        return lambda: merged.switch(pairs)

    def steps(*actions: tuple[str, Callable[[], None]]) -> dict[str, float]:
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, action in actions:
                start = time.perf_counter()
                action()
                times.setdefault(name, []).append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}

    alone = steps(("fold", switch(every[:1])), ("remove", switch([])))
    beside = steps(
        ("all", switch(every)), ("remove", switch(every[:-1])), ("fold", switch(every)),
        ("weight", lambda: merged.set_weight(concepts[0].meta.name, 0.5)), ("none", switch([])),
    )  # fmt: skip
    route = steps(("to", switch(every[:2])), ("between", switch(every[2:4])))
    merged.restore()
    fresh = steps(("merge", lambda: Merged(base, every).restore()))
    return {
        "fold_one": at_most(alone["fold"], ONE_LIMIT),
        "remove_one": at_most(alone["remove"], ONE_LIMIT),
        "fold_one_beside_13": at_most(beside["fold"], ONE_LIMIT),
        "remove_one_of_14": at_most(beside["remove"], ONE_LIMIT),
        "change_one_weight_of_14": at_most(beside["weight"], ONE_LIMIT),
        "merge_14": at_most(beside["all"], ALL_LIMIT),
        "remove_14": at_most(beside["none"], ALL_LIMIT),
        "switch_two_for_two": {"value": round(route["between"], 4)},
        "merge_14_and_restore_with_new_tables": {"value": round(fresh["merge"], 4)},
    }


if __name__ == "__main__":
    main()
