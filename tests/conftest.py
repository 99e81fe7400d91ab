"""What several test files share: the pocket base and two concepts trained for two steps."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when diffusers is imported, hence before it

import pytest
import torch

from sbora_diffusion import cli
from sbora_diffusion.core.concept import write_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.training import ConceptTraining

CONCEPTS = Path(__file__).parent.parent / "concepts"
TINY = TrainConfig(steps=2, copies=1, batch_size=1, resolution=64, preservation=0.0)


def pytest_collection_finish() -> None:
    """Each training ends with a collection of garbage: spare it what stays until the end."""
    gc.freeze()


@pytest.fixture(scope="session")
def pocket() -> Base:
    """The pocket base on the CPU; every test leaves it as it found it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    base = load_base("pocket", "cpu")
    gc.freeze()
    return base


@pytest.fixture(scope="module")
def small_pictures(pocket):
    """In this file the pocket draws and learns 64 × 64 pixels by default: a quarter of the work."""
    unet = pocket.pipeline.unet
    usual = unet.config.sample_size
    unet.register_to_config(sample_size=usual // 2)
    yield
    unet.register_to_config(sample_size=usual)


@pytest.fixture(scope="session")
def tiny_concepts(pocket, tmp_path_factory) -> dict[str, Path]:
    """Name → concept file of two subjects, FA, rank 8, in slots 0 and 1."""
    folder = tmp_path_factory.mktemp("tiny")
    files = {}
    for slot, name in enumerate(("plushbear", "baseballcap")):
        training = ConceptTraining(pocket, read_subject(CONCEPTS / name), TINY, slot * TINY.rank)
        try:
            list(training.steps())
            files[name] = folder / f"{name}.safetensors"
            write_concept(files[name], training.concept())
        finally:
            training.close()
    return files


@pytest.fixture
def sbora(capsys):
    """Run a command: (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return ended.value.code, *capsys.readouterr()

    return run
