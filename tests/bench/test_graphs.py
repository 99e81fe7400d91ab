"""The order of things around a CUDA graph, with a device that only takes notes."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from sbora_diffusion.bench.contestants import GRAPH_WARM_UP, captured


class Stream:
    def wait_stream(self, other):
        assert other is not self


@pytest.fixture
def device(monkeypatch):
    """What is done to the device, in order."""
    notes, usual = [], Stream()

    class Graph:
        def replay(self):
            notes.append("replay")

    @contextmanager
    def graph(_graph, pool):
        notes.append(f"capture into {pool}")
        yield
        notes.append("captured")

    for name, fake in {
        "current_stream": lambda: usual,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda stream: notes.append(f"back: {stream is usual}"),
        "CUDAGraph": Graph,
        "graph": graph,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: notes.append(f"mode {mode}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return notes


def test_a_step_is_rehearsed_checked_for_waiting_and_then_captured_once(device):
    replay = captured(lambda: device.append("step"), "pool")
    checked = ["mode error", "step", "mode 0"]
    capture = ["capture into pool", "step", "captured", "back: True"]
    assert device == ["step"] * GRAPH_WARM_UP + checked + capture
    replay()
    assert device[-1] == "replay"


def test_a_step_that_waits_for_the_device_is_never_captured(device):
    def step():
        if device and device[-1] == "mode error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(step, "pool")
    assert device == ["mode error", "mode 0"]


def test_after_a_capture_that_failed_work_goes_on_in_the_usual_stream(device):
    def step():
        if device and device[-1] == "capture into pool":
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        captured(step, "pool")
    assert device[-1] == "back: True"
