"""Contestants take turns, so that what slows the machine down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], object]
Times = dict[str, list[float]]
LEAST = 3  # rounds that are measured however long they take


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    device: str,
    warm_up: int = 2,
    seconds: float = float("inf"),
    on_round: Callable[[], object] = lambda: None,
    on_error: Callable[[str, Exception], object] | None = None,
) -> Times:
    """Seconds of each contestant in each round; every round begins with another one.

    Args:
        seconds: no new round begins after these, once there are `LEAST`.
        on_error: (name, what a step raised); that contestant is out then, with all its times.
            Without it nothing is caught.
    """
    names, began = list(steps), time.perf_counter()
    times: Times = {name: [] for name in names}
    lost: set[str] = set()  # of names: an error would keep the memory of its frames
    for number in range(warm_up + rounds if steps else 0):
        if number >= warm_up + LEAST and time.perf_counter() - began > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in lost:
                continue
            try:
                taken = timed(steps[name], device)
            except Exception as error:
                if on_error is None:
                    raise
                lost.add(name)
                on_error(name, error)
                continue
            if number >= warm_up:
                times[name].append(taken)
        on_round()
    return {name: seconds_ for name, seconds_ in times.items() if name not in lost}


def timed(step: Step, device: str) -> float:
    """Seconds of one call, until the device is done with it."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def summary(seconds: Sequence[float], floor: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, in seconds and in the floor's time of the same round."""
    ratios = ratio_of_rounds(seconds, floor)
    return {
        "median": _round(statistics.median(seconds)),
        "quartiles": [_round(q) for q in quartiles(seconds)],
        "over_floor": round(statistics.median(ratios), 4),
        "over_floor_quartiles": [round(q, 4) for q in quartiles(ratios)],
        "rounds": len(seconds),
    }


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of one contestant's time in the other's."""
    return statistics.median(ratio_of_rounds(seconds, others))


def ratio_of_rounds(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """One contestant's time in the other's, round by round."""
    return [a / b for a, b in zip(seconds, others, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; values may be as few as two."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _round(seconds: float) -> float:
    return round(seconds, 7)
