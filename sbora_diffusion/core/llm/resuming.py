"""Trainer's checkpoints, sealed: one that is not whole, or was changed, is not read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from sbora_diffusion.core.errors import ConfigError, ConflictError, IntegrityError
from sbora_diffusion.core.manifest import MANIFEST, check_folder, seal_folder
from sbora_diffusion.core.storage import canonical_json, strict_json

IDENTITY = "sbora_training.json"
VERSION = "trainer-1"
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints of one training.

    Args:
        root: the folder that they lie in.
        identity: of the training, as JSON can hold it.
        tell: is told what is found.
    """

    def __init__(self, root: Path, identity: dict[str, Any], tell: Callable[[str], None]) -> None:
        self.root, self._identity, self._tell = root, identity, tell

    def begin_anew(self) -> None:
        """Refuse to write among the checkpoints of a training that is not gone on with.

        Raises:
            ConflictError: there are some.
        """
        if self._numbered():
            raise ConflictError(
                f"{self.root} holds an unfinished training",
                "go on with --resume, or delete the folder",
            )

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None if there is none at all. Those after it are removed.

        Raises:
            IntegrityError: none is whole; names the first file at fault in the newest.
            ConflictError: it belongs to another training.
        """
        first: IntegrityError | None = None
        for step, path in reversed(self._numbered()):
            try:
                check_folder(path)
            except IntegrityError as error:
                self._tell(f"{error.problem}; the checkpoint before it is looked at")
                first = first or error
                continue
            self._check_identity(path)
            self._tell(f"going on from step {step}")
            self._drop_after(step)
            return path
        if first:
            raise first
        self._tell(f"{self.root} holds no checkpoint: the training starts at the beginning")
        return None

    def seal(self, step: int) -> None:
        """Complete the checkpoint of a step."""
        folder = self.root / f"checkpoint-{step}"
        (folder / IDENTITY).write_text(canonical_json(self._identity), encoding="ascii")
        seal_folder(folder, VERSION)

    def remove(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _numbered(self) -> list[tuple[int, Path]]:
        found = self.root.iterdir() if self.root.is_dir() else ()
        named = [(match, path) for path in found if (match := _NAME.fullmatch(path.name))]
        return sorted((int(match[1]), path) for match, path in named)

    def _check_identity(self, path: Path) -> None:
        found = strict_json((path / IDENTITY).read_text(encoding="ascii"))
        for key, value in self._identity.items():
            if found.get(key) != value:
                raise ConflictError(
                    f"{path} belongs to a training with other {key}",
                    "give the same settings, data and base, or start anew",
                )

    def _drop_after(self, step: int) -> None:
        """A damaged checkpoint is gone before Trainer writes into its folder again."""
        for number, path in self._numbered():
            if number > step:
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def refuse_shards(trainer: Trainer) -> None:
    """Refuse checkpoints in shards, whose folders no manifest seals and whose index PyTorch reads
    by an unpickler that runs code.

    Raises:
        ConfigError: FSDP was asked for them.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin and "SHARDED" in str(plugin.state_dict_type):
        raise ConfigError(
            "checkpoints in shards cannot be sealed", "set fsdp_state_dict_type: FULL_STATE_DICT"
        )


class SealingCallback(TrainerCallback):
    """Seals each checkpoint once all processes have written their part."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self._checkpoints.seal(state.global_step)
