"""The pocket trainings go on from their own state as if nothing had been between."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from pocket_run import resume, save_state, update

from sbora_diffusion.core.errors import IntegrityError


class Model(nn.Module):
    """With what the real ones have: pictures, statistics, a lone number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.norm(self.conv(x)).mean() * self.scale


@pytest.fixture
def pictures():
    return torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def begun():
    torch.manual_seed(0)
    model = Model().to(memory_format=torch.channels_last)
    groups = [{"params": [*model.conv.parameters()], "weight_decay": 0.1}]
    groups.append({"params": [*model.norm.parameters(), model.scale], "weight_decay": 0.0})
    return model, torch.optim.AdamW(groups, lr=1e-2)


def trained(model, optimizer, pictures):
    for x in pictures:
        update(optimizer, model, (model(x) - 1) ** 2)
    return model.state_dict()


def test_a_training_goes_on_bit_for_bit(pictures, tmp_path):
    model, optimizer = begun()
    trained(model, optimizer, pictures[:2])
    average = copy.deepcopy(model)
    models = {"model": model, "average": average}
    save_state(tmp_path / "state", models, optimizer, {"steps": 2, "images": 4})
    expected = trained(model, optimizer, pictures[2:])

    again, its_optimizer = begun()
    its_average = Model()
    models = {"model": again, "average": its_average}
    assert resume(tmp_path / "state", models, its_optimizer) == {"steps": 2, "images": 4}
    found = trained(again, its_optimizer, pictures[2:])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    kept = its_average.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in average.state_dict().items())


def test_nothing_to_go_on_from_changes_nothing(tmp_path):
    model, optimizer = begun()
    before = copy.deepcopy(model.state_dict())
    assert resume(tmp_path / "none", {"model": model}, optimizer) is None
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_damaged_state_is_refused(tmp_path):
    model, _ = begun()
    save_state(tmp_path / "state", {"model": model}, None, {"scaling_factor": 0.5})
    file = next((tmp_path / "state").rglob("model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        resume(tmp_path / "state", {"model": model})
