"""Records of studies: figures with what they are measured against, and where they come from."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.core.errors import ConfigError

PACKAGES = ("torch", "diffusers", "transformers", "peft", "lycoris_lora", "open_clip_torch", "timm")


def at_least(value: float, threshold: float) -> dict[str, Any]:
    """A figure that must reach its threshold."""
    value = round(value, 4)
    return {"value": value, "threshold": threshold, "met": value >= threshold}


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A figure that must stay within its limit."""
    value = round(value, 4)
    return {"value": value, "limit": limit, "met": value <= limit}


def run_of(command: str, device: str, seconds: float, commit: str | None) -> dict[str, Any]:
    """Where figures come from.

    Args:
        commit: of the code, for a machine without its checkout; asked of git by default.

    Raises:
        ConfigError: there is no commit to name.
    """
    return {
        "command": command,
        "commit": commit or commit_here(),
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


def commit_here() -> str:
    """The commit of this checkout, with "+" where tracked files differ from it.

    Raises:
        ConfigError: this is no checkout.
    """
    try:
        head, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            "a record names the commit, and there is no git checkout here", "give --commit"
        ) from error
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
