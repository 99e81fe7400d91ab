"""Several processes train one concept: the same one, and it can be gone on with."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from sbora_diffusion import team
from sbora_diffusion.checkpointing import NONE
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.processes import refuse_apart
from tests.team_training import trained


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes leave in a folder."""
    folder = tmp_path_factory.mktemp("team")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.team_training", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_the_concept_that_one_trains_with_their_batches(
    pocket, together, tmp_path
):
    alone = read_concept(trained(pocket, tmp_path, "alone", NONE))
    both = read_concept(together / "whole.safetensors")
    assert both.layers.keys() == alone.layers.keys()
    for name, layer in alone.layers.items():
        assert torch.equal(both.layers[name].indices, layer.indices)
        scale = layer.factor.abs().max()
        assert scale > 0
        torch.testing.assert_close(
            both.layers[name].factor, layer.factor, rtol=1e-3, atol=2e-3 * scale.item()
        )
    for name, vectors in alone.embeddings.items():
        torch.testing.assert_close(both.embeddings[name], vectors, rtol=1e-3, atol=1e-4)


def test_together_a_training_goes_on_bit_for_bit(together):
    whole, broken = (together / f"{name}.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    assert not list(together.glob("*.checkpoints"))


def refusal(kind=DistributedType.MULTI_GPU, **settings) -> str:
    accelerator = SimpleNamespace(distributed_type=kind, num_processes=2)
    with pytest.raises(ConfigError) as caught:
        refuse_apart(accelerator, TrainConfig(**settings))
    return str(caught.value)


def test_what_cannot_be_trained_together_is_refused():
    assert "FSDP divides the weights" in refusal(DistributedType.FSDP)
    assert "dropout draws differently" in refusal(dropout=0.1)
    assert "a batch of 1 for 2 processes" in refusal(batch_size=1)


def test_work_of_one_for_all_is_done_where_there_is_one():
    assert team.size() == 1 and team.leads()
    assert team.once(lambda: 3, on_cpu=True) == 3
