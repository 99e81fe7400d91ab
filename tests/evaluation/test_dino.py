"""DINO as a further judge. Its weights are random here: only their place and shape matter."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.evaluation import dino
from sbora_diffusion.evaluation.dino import ARCHITECTURE, DinoFeatures
from tests.evaluation.test_features import noise


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0).eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    place = tmp_path_factory.mktemp("dino")
    save_file(network.state_dict(), place / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def judge(folder) -> DinoFeatures:
    return DinoFeatures.load(str(folder))


def test_features_are_the_class_token_of_the_centred_square(judge, network):
    picture = Image.new("RGB", (512, 256), "red")
    picture.paste("blue", (144, 16, 368, 240))  # the 224 pixels in the middle
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colour = (torch.tensor([0.0, 0.0, 1.0]) - mean) / deviation
    with torch.no_grad():
        pixels = colour[:, None, None].expand(3, 224, 224)[None]
        token = network.forward_features(pixels)[:, 0]
    found = judge.images([picture])
    assert found.shape == (1, 384) and found.dtype == torch.float32
    torch.testing.assert_close(found, token / token.norm())


def test_features_have_unit_length_and_do_not_depend_on_the_batch_size(judge):
    pictures = [*noise(2), noise(1)[0].convert("L")]
    found = judge.images(pictures)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(judge.images(pictures, 2), found, atol=1e-5, rtol=0)
    assert judge.images([]).shape == (0, 384)


def test_a_checkpoint_of_the_authors_is_refused_and_never_opened(network, tmp_path, monkeypatch):
    file = tmp_path / "dino_deitsmall16_pretrain.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(FormatError, match=r"as safetensors; give the model\.safetensors that timm"):
        DinoFeatures.load(str(file))
    with pytest.raises(ConfigError, match="holds no weights"):
        DinoFeatures.load(str(tmp_path))


def test_missing_and_wrong_weights_are_refused_with_a_remedy(tmp_path, network):
    with pytest.raises(ConfigError, match=r"nowhere holds no weights.*model\.safetensors.*'timm'"):
        DinoFeatures.load(str(tmp_path / "nowhere"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not weights")
    with pytest.raises(FormatError, match="does not hold the weights"):
        DinoFeatures.load(str(file))
    save_file({"cls_token": torch.zeros(1, 1, 192)}, file)
    with pytest.raises(FormatError, match="does not hold the weights"):
        DinoFeatures.load(str(tmp_path))


def test_without_a_connection_the_remedy_is_a_file(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ResourceError, match=r"cannot be fetched.*give a folder"):
        DinoFeatures.load(dino.FETCHED)


def test_a_checkpoint_that_timm_fetches_is_refused(monkeypatch, tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "fetched.bin")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.load(tmp_path / "fetched.bin"))
    with pytest.raises(FormatError, match=r"could run code.*published as \.safetensors"):
        DinoFeatures.load(dino.FETCHED)
    assert torch.load(tmp_path / "fetched.bin")["w"] == 1, "it is forbidden no longer"


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed.*sbora-diffusion\[eval\]"):
        DinoFeatures.load(dino.FETCHED)
