"""The goals that figures are held against."""

from collections.abc import Mapping
from typing import Any

from sbora_diffusion.bench.settings import FLOOR
from sbora_diffusion.bench.timing import Times, median_ratio
from sbora_diffusion.records import at_least, at_most

FOLDED = ("sbora_fa_folded", "sbora_fb_folded")
OVER_FLOOR = {1: 1.08, 4: 1.08, 16: 1.03}  # batch size → times the floor, SD 1.5 on a GPU
SPEED_AT_16 = {"lora": 1.2, "dora": 1.55}  # times the other's speed, SD 1.5 on a GPU
POCKET_SPEED = 1.15  # times LoRA's
PEAK = {"sbora_fa_folded": 1.01, "sbora_fb_folded": 1.04}  # times the floor's activations
LAYER = {"sbora_fa_folded": 1.10, "sbora_fb_folded": 1.25}  # times the frozen layer, on a CPU
BYTES = 0.51  # times LoRA's optimizer state and file
MIXED_SPEED, MIXED_ROWS = 0.9, 16  # times the floor's throughput, SD 1.5 on a GPU
TRAINING = {"concepts": 14, "steps": 300, "seconds": 180.0}  # pocket on a GPU
MERGE = {"cpu": (100.0, 1000.0), "cuda": (5.0, 50.0)}  # milliseconds: one concept, all

Goals = dict[str, dict[str, Any]]


def batch_goals(
    shape: str, device: str, batch: int, methods: Mapping[str, Any], times: Times
) -> Goals:
    """Of one batch size.

    Args:
        methods: the figures, method → mode → figures.
        times: "<method> <mode>" → seconds of each round.
    """
    goals: Goals = {}
    for name in (name for name in FOLDED if name in methods):
        if shape == "sd15" and device.startswith("cuda"):
            if batch in OVER_FLOOR:
                best = methods[name]["at_best"]["over_floor"]
                goals[f"{name}: time over the floor"] = at_most(best, OVER_FLOOR[batch])
            if batch == 16:
                goals |= _speeds(name, SPEED_AT_16, times)
        if shape == "sd15" and "peak_over_floor" in methods[name].get("eager", {}):
            peak = methods[name]["eager"]["peak_over_floor"]
            goals[f"{name}: memory over the floor"] = at_most(peak, PEAK[name])
        if shape == "pocket":
            goals |= _speeds(name, {"lora": POCKET_SPEED}, times)
    return goals


def _speeds(name: str, thresholds: Mapping[str, float], times: Times) -> Goals:
    """Eager against eager."""
    own = times.get(f"{name} eager")
    return {
        f"{name}: speed in that of {other}": at_least(
            median_ratio(times[f"{other} eager"], own), threshold
        )
        for other, threshold in thresholds.items()
        if own and f"{other} eager" in times
    }


def size_goals(shape: str, adapters: Mapping[str, Mapping[str, int]]) -> Goals:
    """Of what a method stores, for shapes where that is not all headers."""
    if "lora" not in adapters or shape == "tiny":
        return {}
    lora = adapters["lora"]
    return {
        f"{name}: {kind} in LoRA's": at_most(own[kind] / lora[kind], BYTES)
        for name, own in adapters.items()
        if name in FOLDED
        for kind in ("optimizer_bytes", "file_bytes")
    }


def layer_goals(device: str, dtype: str, width: int, methods: Mapping[str, Any]) -> Goals:
    """Of one layer, 320 wide, in fp32 on a CPU."""
    if (device, dtype, width) != ("cpu", "fp32", 320):
        return {}
    return {
        f"{name}: time over the frozen layer": at_most(methods[name]["over_floor"], limit)
        for name, limit in LAYER.items()
        if name in methods
    }


def merge_limits(shape: str, device: str) -> tuple[float, float] | None:
    """Milliseconds for one concept and for all of them, in the sizes of Stable Diffusion 1.5."""
    return MERGE.get(device.partition(":")[0]) if shape == "sd15" else None


def mixed_goals(shape: str, device: str, rows: int, methods: Mapping[str, Any]) -> Goals:
    """Of a batch whose rows have different concepts, each way at its best."""
    if (shape, rows) != ("sd15", MIXED_ROWS) or not device.startswith("cuda"):
        return {}
    return {
        f"{name}: throughput in the floor's": at_least(
            1 / ways["at_best"]["over_floor"], MIXED_SPEED
        )
        for name, ways in methods.items()
        if name != FLOOR
    }


def training_goals(device: str, concepts: int, steps: int, seconds: float) -> Goals:
    """Of many concepts that train at once."""
    asked = (TRAINING["concepts"], TRAINING["steps"])
    if (concepts, steps) != asked or not device.startswith("cuda"):
        return {}
    return {"seconds": at_most(seconds, TRAINING["seconds"])}
