"""Two threads sum in whatever order they like; a training must not let it show."""

import os
import subprocess
import sys
from pathlib import Path

from tests.diffusion.helpers import CONCEPTS

TRAIN = """
import sys
from pathlib import Path
import torch
from sbora_diffusion.core.concept import sealed
from sbora_diffusion.diffusion.bases import load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.training import ConceptTraining
torch.set_num_threads(2)
config = TrainConfig(steps=12, batch_size=4, copies=2, resolution=64, preservation=0.0)
training = ConceptTraining(load_base("pocket", "cpu"), read_subject(Path(sys.argv[1])), config, 0)
list(training.steps())
print(sealed(training.concept()).meta.digest)
"""


def digest_of_a_training_with_two_threads() -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run(
        [sys.executable, "-c", TRAIN, str(CONCEPTS / "plushbear")],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout.split()[-1]


def test_two_processes_with_two_threads_each_train_the_same_bytes():
    first, second = (digest_of_a_training_with_two_threads() for _ in range(2))
    assert len(first) == 64 and first == second
