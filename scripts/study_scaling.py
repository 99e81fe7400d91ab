"""What a second GPU gives: to one concept, to fourteen, and to a language model.

    python scripts/study_scaling.py --device cuda
    python scripts/study_scaling.py --device cuda --parts language        # adds to the record
    python scripts/study_scaling.py --tiny --device cpu -o /tmp/scale.json      # a rehearsal

Four parts, all by the files in `scripts/accelerate` or the variables that launchers set:
`together` trains one concept on pocket and in the sizes of Stable Diffusion 1.5 (random weights),
with one process and with two, for the time of a step (16 pictures a GPU, bf16) and for what comes
out (fp32). `workers` trains the fourteen concepts one after another on pocket, by one worker and by
two. `killed` kills one of two workers in the middle, starts it again with --resume, and compares
the files. `language` trains an adapter for a model of Llama-3-8B's shape (random weights) in bf16
and in NF4, on one GPU and divided over two by FSDP2. Each part is written to results/scale.json
when it is done; the file's other parts stay. A part that fails says why there.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scaling_study.language import language
from scaling_study.processes import GPUS, ROOT, Failed, stop_all
from scaling_study.together import measure, together
from scaling_study.workers import killed, workers
from study_options import command

from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.records import run_of

Part = Callable[[argparse.Namespace, Path], dict[str, Any]]
PARTS: dict[str, Part] = {
    "together": together,
    "workers": workers,
    "killed": killed,
    "language": language,
}
WHAT = "one concept, fourteen concepts and a language model, on one GPU and on two"


def main() -> None:
    args = arguments()
    if args.measure:
        measure(args.measure, args.device, args.tiny)
        return
    if args.device == "cuda" and torch.cuda.device_count() < GPUS:
        sys.exit(f"error: expected {GPUS} GPUs, found {torch.cuda.device_count()}")
    record = json.loads(args.record.read_text()) if args.record.exists() else {"what": WHAT}
    for name in args.parts:
        record[name] = recorded(PARTS[name], args)
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(record[name]), flush=True)
    if '"failed"' in json.dumps([record[name] for name in args.parts]):
        sys.exit(1)


def recorded(part: Part, args: argparse.Namespace) -> dict[str, Any]:
    """What a part found, or why it found nothing; and where that comes from."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = part(args, Path(folder))
        except Failed as error:
            found = {"failed": str(error)}
        finally:
            stop_all()
    return found | {"run": run_of(command(), args.device, time.monotonic() - began, args.commit)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=400, help="of each worker's concepts")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--record", type=Path, default=ROOT / "results" / "scale.json")
    return parser.parse_args()


if __name__ == "__main__":
    quiet_libraries()
    main()
