"""`sbora export` in its forms, and what it refuses."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from sbora_diffusion import hub
from sbora_diffusion.core.errors import ResourceError
from sbora_diffusion.diffusion import bases
from tests.diffusion.helpers import strong_concept
from tests.diffusion.thin_pocket import thin_pocket
from tests.test_cli import refused


@pytest.fixture(scope="module")
def thin(pocket):
    return thin_pocket(pocket)


@pytest.fixture(scope="module")
def files(thin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, slot in (("one", 0), ("two", 1), ("twin", 0)):
        strong_concept(thin, folder, name, slot=slot, rank=4, base_name="pocket")
    return folder


@pytest.fixture(autouse=True)
def _one_base(thin, monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "load_base", lambda *_: copy.deepcopy(thin))
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    monkeypatch.chdir(tmp_path)


def test_each_form_is_a_folder_with_weights_embeddings_and_a_card(sbora, files, tmp_path):
    pair = (f"{files / 'one.safetensors'}:0.5", files / "two.safetensors")
    weights = {
        "kohya": ["one+two.safetensors"],
        "diffusers": ["pytorch_lora_weights.safetensors"],
        "peft": [
            f"{part}/{name}"
            for part in ("text_encoder", "unet")
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ],
    }
    for form, names in weights.items():
        status, out, _ = sbora("export", *pair, "--to", form, "-o", f"deep/{form}", "--json")
        facts = json.loads(out)
        assert status == 0 and facts["to"] == form
        assert facts["concepts"] == [
            {"name": "one", "weight": 0.5},
            {"name": "two", "weight": 1.0},
        ]
        common = ["README.md", "sbora.json"]
        common += ["embeddings/one.safetensors", "embeddings/two.safetensors"]
        assert facts["files"] == sorted(names + common)
        assert (tmp_path / "deep" / form / "README.md").read_text().startswith("---\n")


def test_a_checkpoint_is_the_merged_model_with_a_card(sbora, files, tmp_path):
    pair = (files / "one.safetensors", files / "two.safetensors")
    assert sbora("export", *pair, "--to", "checkpoint", "-o", "model")[0] == 0
    assert sbora("merge", *pair, "-o", "merged", "--no-calibrate")[0] == 0
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        model, merged = (load_file(tmp_path / folder / part) for folder in ("model", "merged"))
        assert [key for key in model if not torch.equal(model[key], merged[key])] == []
    card = (tmp_path / "model" / "README.md").read_text()
    assert "`<one>`" in card and "DiffusionPipeline.from_pretrained" in card
    stock = StableDiffusionPipeline.from_pretrained("model", local_files_only=True)
    assert stock.tokenizer.convert_tokens_to_ids("<two>") >= stock.tokenizer.vocab_size


def test_a_form_of_numbers_can_be_chosen(sbora, files, tmp_path):
    one = files / "one.safetensors"
    assert sbora("export", one, "--to", "kohya", "-o", "half", "--dtype", "fp16")[0] == 0
    tensors = load_file(tmp_path / "half" / "one.safetensors")
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in tensors.items()}
    assert kinds == {"weight": torch.float16, "alpha": torch.float32}


def test_what_cannot_be_exported_is_refused_in_one_line(sbora, files, tmp_path):
    one, twin = files / "one.safetensors", files / "twin.safetensors"
    words = ("'one'", "'twin'", "--allow-overlap")
    assert refused(sbora("export", one, twin, "--to", "kohya", "-o", "x"), *words)
    assert sbora("export", one, twin, "--to", "kohya", "-o", "x", "--allow-overlap")[0] == 0
    assert refused(sbora("export", one, "--to", "kohya", "-o", "x"), "not empty")
    assert refused(sbora("export", one, "--to", "onnx", "-o", "y"), "onnx")
    assert refused(sbora("export", "none.safetensors", "--to", "kohya", "-o", "y"), "neither")
    (tmp_path / "b.safetensors").write_text("x")
    checkpoint = ("export", one, "--to", "checkpoint", "-o", "y", "--base", "b.safetensors")
    assert refused(sbora(*checkpoint), "b.safetensors is not a safetensors file")
    assert not (tmp_path / "y").exists()


class FakeHub:
    """Keeps what it is asked for; refuses uploads when told to."""

    def __init__(self, refuse=False):
        self.asked, self.refuse = [], refuse

    def create_repo(self, repo_id, **options):
        self.asked.append(("create", repo_id, options))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, **options):
        if self.refuse:
            raise HfHubHTTPError("403 Forbidden", response=Mock(headers={}))
        names = sorted(p.name for p in options["folder_path"].rglob("*"))
        self.asked.append(("upload", options["repo_id"], names))


def test_an_export_goes_to_the_hub_if_asked_to_into_a_private_repository(
    sbora, files, tmp_path, monkeypatch
):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    one = files / "one.safetensors"
    status, out, _ = sbora(
        "export", one, "--to", "kohya", "-o", "x", "--push-to-hub", "me/one", "--json"
    )
    assert status == 0 and json.loads(out)["address"] == "https://hub.example/me/one"
    create, upload = fake.asked
    assert create == ("create", "me/one", {"private": True, "exist_ok": True})
    names = ["README.md", "embeddings", "one.safetensors", "one.safetensors", "sbora.json"]
    assert upload == ("upload", "me/one", names)


def test_a_hub_that_refuses_leaves_the_export_and_says_so(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ResourceError, match=r"is written, but 'me/one'.*hf auth login"):
        hub.push_to_hub(tmp_path / "x", "me/one", FakeHub(refuse=True))
