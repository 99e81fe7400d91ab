"""Several processes train one adapter: the one that a single process trains with the same batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sbora_diffusion import cli
from tests.core.llm.tiny import examples, save_base

SETTINGS = "rank=4 rate=1e-2 steps=4 batch_size=4 micro_batch_size=2 template=plain dtype=fp32"
FSDP = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A training's, without its output."""
    folder = tmp_path_factory.mktemp("processes")
    items = [{"instruction": e.instruction, "output": e.output} for e in examples(20)]
    (folder / "train.json").write_text(json.dumps(items))
    settings = [f"-s{setting}" for setting in SETTINGS.split()]
    base = save_base(folder / "base")
    return ["llm", "train", str(base), str(folder / "train.json"), *settings, "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The adapter of one process."""
    output = tmp_path_factory.mktemp("alone") / "adapter"
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "-o", str(output)])
    assert ended.value.code == 0
    return load_file(output / "adapter_model.safetensors")


def by_two(module, arguments, output, **environment):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *arguments, "-o", str(output)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") + done.stderr.count(", loss") == 1  # one of them speaks
    return load_file(output / "adapter_model.safetensors")


def test_two_processes_with_their_halves_of_a_batch(arguments, alone, tmp_path):
    both = by_two("sbora_diffusion", arguments, tmp_path / "adapter")
    assert both.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "adapter.checkpoints").exists()


def test_two_processes_with_their_parts_of_the_weights(arguments, alone, tmp_path):
    options = [*arguments, "--save-every", "2"]
    divided = by_two("tests.core.llm.divided", options, tmp_path / "adapter", **FSDP)
    assert divided.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-5, atol=1e-6)


def test_two_processes_with_their_parts_of_nf4_weights(arguments, tmp_path):
    options = [*arguments, "--quantize", "nf4"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*options, "-o", str(tmp_path / "alone")])
    assert ended.value.code == 0
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    divided = by_two("tests.core.llm.divided", options, tmp_path / "divided", **FSDP)
    assert divided.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-5, atol=1e-6)
