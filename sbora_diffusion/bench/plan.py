"""What one run measures, checked before the work begins."""

import difflib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from sbora_diffusion.bench.methods import METHODS
from sbora_diffusion.bench.settings import FLOOR, SpeedConfig
from sbora_diffusion.bench.shapes import SHAPES, Shape
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.bases import DTYPES

SECTIONS = ("layer", "merging", "mixed_batch", "step", "training")


class OutOfTimeError(Exception):
    """The limit of the run is over."""


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        device: "cpu", "cuda" …
        methods: the floor first.
        absent: method → why it is not available here.
        on_round: called after each round, with what is measured.
        ends: when the limit is over, on the clock of `time.perf_counter`.
    """

    config: SpeedConfig
    device: str
    sections: Sequence[str]
    shapes: Sequence[str]
    methods: Sequence[str]
    absent: dict[str, str] = field(default_factory=dict)
    on_round: Callable[[str], None] = lambda _: None
    ends: float = float("inf")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> str:
        return self.config.dtype or ("bf16" if self.on_gpu else "fp32")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def eager(self) -> "Plan":
        """The same, in eager mode alone."""
        return replace(self, config=self.config.model_copy(update={"modes": ["eager"]}))

    def time_left(self) -> float:
        """Seconds until the limit.

        Raises:
            OutOfTimeError: there are none.
        """
        left = self.ends - time.perf_counter()
        if left <= 0:
            raise OutOfTimeError(f"left out: the limit of {self.config.limit:g} s is over")
        return left

    def rank(self, shape: Shape) -> int:
        return self.config.rank or shape.rank

    def batches(self, shape: Shape) -> list[int]:
        return list(self.config.batches or shape.batches)


def make_plan(
    config: SpeedConfig,
    device: str,
    only: Sequence[str] = (),
    shapes: Sequence[str] = (),
    methods: Sequence[str] = (),
) -> Plan:
    """Check what is asked for; nothing given is everything that suits the device.

    Training many concepts takes minutes on a GPU and an hour elsewhere, where it has to be asked
    for.

    Raises:
        ConfigError: a name is unknown, a method's package is missing, or the device cannot do it.
    """
    _check_device(device)
    if "graphs" in config.modes and not device.startswith("cuda"):
        raise ConfigError(f"CUDA graphs need a CUDA device, not {device}", "leave out --graphs")
    on_gpu = device.startswith("cuda")
    sections = chosen(only, SECTIONS, "section") or [
        name for name in SECTIONS if on_gpu or name != "training"
    ]
    asked = chosen(methods, METHODS, "method")
    wanted = [name for name in METHODS if name == FLOOR or name in (asked or METHODS)]
    absent = {name: why for name in wanted if (why := METHODS[name].missing)}
    if asked and absent:
        name, why = next(iter(absent.items()))
        raise ConfigError(f"{name}: {why}", "leave it out of --methods or install it")
    suited = ["sd15"] if on_gpu else ["pocket"]
    return Plan(
        config,
        device,
        sections,
        chosen(shapes, SHAPES, "shape") or suited,
        [name for name in wanted if name not in absent],
        absent,
    )


def chosen(given: Sequence[str], known: Collection[str], kind: str) -> list[str]:
    """Names, each known; a text may hold several with commas between them.

    Raises:
        ConfigError: names the nearest known one.
    """
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown {kind} {name!r}", remedy)
    return list(dict.fromkeys(names))


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} cannot be used: {reason}", "try --device cpu"
        ) from error
