"""Shares with their intervals, and the record that sections are written to."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbora_diffusion.records import at_least

Z_95 = 1.959963984540054  # quantile of the normal distribution for 95 %
WHAT = "what the pocket base draws and its judge recognises, on prompts not used in training"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    assert 0 <= successes <= trials and trials > 0, (successes, trials)
    share, z = successes / trials, Z_95**2 / trials
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def share(right: Sequence[bool], threshold: float | None = None) -> dict[str, Any]:
    """The share of what is right, with its interval and, where there is one, its threshold."""
    value = sum(right) / len(right)
    figure = {"value": round(value, 4)} if threshold is None else at_least(value, threshold)
    interval = [round(bound, 4) for bound in wilson(sum(right), len(right))]
    return {**figure, "interval": interval, "of": len(right)}


def write_section(path: Path, name: str, figures: dict[str, Any], run: dict[str, Any]) -> None:
    """Put one section in place of an older one of its name; the others stay as they are."""
    record = json.loads(path.read_text()) if path.exists() else {}
    runs = [old for old in record.pop("runs", []) if old["section"] != name]
    sections = {k: v for k, v in record.items() if isinstance(v, dict) and k != "versions"}
    latest = {key: run[key] for key in ("date", "commit", "device", "versions")}
    merged = {
        "what": WHAT,
        **latest,
        "runs": [*runs, {"section": name, **run}],
        **sections,
        name: figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
