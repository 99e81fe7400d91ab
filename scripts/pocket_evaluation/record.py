"""Figures with what they are measured against, and the record that they are written to."""

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Z_95 = 1.959963984540054  # quantile of the normal distribution for 95 %
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "timm")
WHAT = "what the pocket base draws and its judge recognises, on prompts not used in training"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    assert 0 <= successes <= trials and trials > 0, (successes, trials)
    share, z = successes / trials, Z_95**2 / trials
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def at_least(value: float, threshold: float) -> dict[str, Any]:
    """A figure that must reach its threshold."""
    value = round(value, 4)
    return {"value": value, "threshold": threshold, "met": value >= threshold}


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A figure that must stay within its limit."""
    value = round(value, 4)
    return {"value": value, "limit": limit, "met": value <= limit}


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def share(right: Sequence[bool], threshold: float | None = None) -> dict[str, Any]:
    """The share of what is right, with its interval and, where there is one, its threshold."""
    value = sum(right) / len(right)
    figure = {"value": round(value, 4)} if threshold is None else at_least(value, threshold)
    interval = [round(bound, 4) for bound in wilson(sum(right), len(right))]
    return {**figure, "interval": interval, "of": len(right)}


def run_of(command: str, device: str, seconds: float, commit: str | None) -> dict[str, Any]:
    """Where figures come from.

    Args:
        commit: of the code, for a machine without its checkout; asked of git by default.
    """
    return {
        "command": command,
        "commit": commit or _commit(),
        "device": device_name(device),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds, 1),
    }


def device_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3", "AMD EPYC 7763 64-Core Processor, 2 threads"."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit, with "+" where tracked files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit("there is no git checkout here: give --commit") from error
    return f"{head}+" if changed.strip() else head


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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
