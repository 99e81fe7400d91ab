"""The fixed order in which a GPU adds, as far as a machine without one can tell."""

import os

import pytest
import torch

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion import bases
from sbora_diffusion.diffusion.runtime import Runtime, deterministic
from tests.conftest import CONCEPTS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def orders() -> tuple[bool, bool]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), filled


def test_a_gpu_adds_in_a_fixed_order_within_and_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = orders()
    with deterministic(GPU):
        assert orders() == (True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert orders() == before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic(CPU):
        assert orders() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_kernel_without_an_order_is_named_and_other_faults_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, place = orders(), torch.tensor([0])
    said = r"put_.* in no fixed order.*--device cpu"
    with pytest.raises(ConfigError, match=said), deterministic(GPU):
        torch.zeros(1).put_(place, torch.ones(1))
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic(GPU):
        torch.zeros(2) + torch.zeros(3)
    assert orders() == before


def test_cublas_is_told_before_the_base_comes_to_the_gpu(monkeypatch):
    said = []

    def moved(_pipeline: object, device: str) -> None:
        said.append((device, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(bases.DiffusionPipeline, "to", moved)
    for device, fixed in (("cuda", False), ("cpu", True), ("cuda:1", True)):
        bases.load_base("pocket", device, runtime=Runtime(deterministic=fixed))
    assert said == [("cuda", None), ("cpu", None), ("cuda:1", ":4096:8")]


def test_train_has_a_switch_for_it(monkeypatch, sbora):
    def load(*given: object) -> None:
        raise ConfigError(f"asked for {given[-1]}")

    monkeypatch.setattr(bases, "load_base", load)
    command = ("train", CONCEPTS / "plushbear")
    assert "deterministic=False" in sbora(*command)[2]
    assert "deterministic=True" in sbora(*command, "--deterministic")[2]
