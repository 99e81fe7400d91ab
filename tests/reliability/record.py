"""`results/reliability.json`: what long runs counted, and where."""

import json
from pathlib import Path
from typing import Any

from sbora_diffusion.core.storage import write_atomically
from sbora_diffusion.records import run_of

RECORD = Path(__file__).parents[2] / "results" / "reliability.json"
WHAT = "What the full forms of the reliability tests and the long fuzzing counted."


def keep(
    path: Path, name: str, command: str, seconds: float, commit: str, figures: dict[str, Any]
) -> None:
    """Write a run's figures in place of those of the run of the same name."""
    run = run_of(command, "cpu", seconds, commit)
    runs = {old["name"]: old for old in _runs(path)}
    runs[name] = {"name": name, **run, "figures": figures}
    about = {key: run[key] for key in ("commit", "device", "versions", "date")}
    record = {"what": WHAT, **about, "runs": [runs[name] for name in sorted(runs)]}
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def kept(path: Path, name: str) -> dict[str, Any]:
    """The run of that name, {} if there is none."""
    return next((run for run in _runs(path) if run["name"] == name), {})


def _runs(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.exists() else []
