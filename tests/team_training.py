"""Started twice by a launcher: one concept trained by both processes, without a break and with one.

python -m torch.distributed.run --nproc-per-node 2 -m tests.team_training FOLDER
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch

from sbora_diffusion import team
from sbora_diffusion.checkpointing import Checkpointing
from sbora_diffusion.diffusion.bases import load_base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.jobs import train_concept
from sbora_diffusion.library import Library
from tests.conftest import CONCEPTS

RECIPE = TrainConfig(
    steps=3, batch_size=3, copies=2, resolution=64, preservation=0.0, targets="cross-attention"
)
"""Three pictures a step: two for one process, one for the other."""


def trained(base, folder: Path, name: str, checkpointing: Checkpointing, on_record=None) -> Path:
    """The concept file of one training with a library of its own."""
    library, output = Library(folder / f"{name}.sqlite3"), folder / f"{name}.safetensors"
    train_concept(
        base, CONCEPTS / "plushbear", RECIPE, library=library, output=output,
        on_record=on_record, checkpointing=checkpointing,
    )  # fmt: skip
    return output


def stop(record) -> None:
    if record.step == 2:
        raise KeyboardInterrupt


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    base = load_base("pocket", "cpu")
    trained(base, folder, "whole", Checkpointing(every=1))
    with suppress(KeyboardInterrupt):
        trained(base, folder, "broken", Checkpointing(every=1), stop)
    trained(base, folder, "broken", Checkpointing(every=1, resume=True))
    team.part()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
