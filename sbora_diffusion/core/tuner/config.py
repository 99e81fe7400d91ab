"""The configuration of an SBoRA adapter, as PEFT stores it in `adapter_config.json`."""

from dataclasses import dataclass
from enum import Enum

from peft import PeftConfig

from sbora_diffusion.core.allocation import slot_range
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.functional import SBORA, Variant


class SboraPeftType(str, Enum):  # noqa: UP042 - f"{member}" must stay what PEFT's own enum gives
    """PEFT's own enum is closed; its tables accept any member that hashes like its string."""

    SBORA = "SBORA"


@dataclass
class SboraConfig(PeftConfig):
    """SBoRA on the linear layers of a model (arXiv 2407.05413).

    The indices of a layer are the range of the slot in the permutation that `core.allocation` draws
    for (allocation_seed, name_prefix + module path): agree on seed, rank and slots and any two
    adapters of one variant are disjoint. A state dict carries its indices and overrides them.

    Args:
        r: rank, the number of indices per layer.
        alpha: scale = weight · alpha / r; r without one.
        variant: "fa" (fixed A, columns) or "fb" (fixed B, rows).
        dropout: probability, on the r gathered columns (FA) or on the input of A (FB).
        target_modules: names, suffixes, a regex, or "all-linear", as everywhere in PEFT.
        exclude_modules: as `target_modules`, left out.
        modules_to_save: modules trained and saved whole.
        trainable_token_indices: rows of the token embedding to train (pivotal tuning).
        allocation_seed: seed of the permutations, not of the training.
        slot: the concept's place, range [slot · r, (slot + 1) · r).
        start: first entry of the range where ranks differ and a slot cannot name it.
        name_prefix: put before the module path to get the canonical layer name, e.g. "unet.".
        merge_key: fixes the order of summation when folding, the concept's digest; without one the
            adapter's name.

    Raises:
        ConfigError: a value is out of its range.
    """

    r: int = 8
    alpha: float | None = None
    variant: Variant = "fa"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    allocation_seed: int = 0
    slot: int = 0
    start: int | None = None
    name_prefix: str = ""
    merge_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SboraPeftType.SBORA
        self.alpha = float(self.r if self.alpha is None else self.alpha)
        self.target_modules = _sorted(self.target_modules)
        self.exclude_modules = _sorted(self.exclude_modules)
        self._check()

    @property
    def index_range(self) -> tuple[int, int]:
        """The range [start, stop) of every layer's permutation."""
        if self.start is None:
            return slot_range(self.slot, self.r)
        return self.start, self.start + self.r

    def _check(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be 1 or more, got {self.r}")
        if self.variant not in SBORA:
            raise ConfigError(f"variant must be 'fa' or 'fb', got {self.variant!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if min(self.index_range) < 0:
            raise ConfigError(f"start must be 0 or more, got {self.start}")


def _sorted(names: list[str] | str | None) -> list[str] | str | None:
    """Sorted, so that the saved configuration does not depend on PYTHONHASHSEED."""
    return names if names is None or isinstance(names, str) else sorted(set(names))
