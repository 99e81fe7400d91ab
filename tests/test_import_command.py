"""`sbora import`: of exports, of the PEFT tuner's folders, of published checkpoints, projected."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.concept_set import read_concept_set
from sbora_diffusion.core.tuner import SboraConfig
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
    for name, slot in (("one", 0), ("two", 1)):
        strong_concept(thin, folder, name, slot=slot, rank=4, base_name="pocket")
    return folder


@pytest.fixture(autouse=True)
def _one_base(thin, monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "load_base", lambda *_: copy.deepcopy(thin))
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    monkeypatch.chdir(tmp_path)


def test_one_concept_goes_out_and_comes_back_as_the_same_file(sbora, files, tmp_path):
    one = files / "one.safetensors"
    for form in ("kohya", "diffusers", "peft"):
        assert sbora("export", one, "--to", form, "-o", form)[0] == 0
        assert sbora("import", form, "-o", f"back/{form}.safetensors")[0] == 0
        assert (tmp_path / "back" / f"{form}.safetensors").read_bytes() == one.read_bytes()


def test_several_concepts_come_back_as_a_set_with_their_weights(sbora, files):
    pair = (f"{files / 'one.safetensors'}:0.5", files / "two.safetensors")
    assert sbora("export", *pair, "--to", "kohya", "-o", "lora")[0] == 0
    status, out, _ = sbora("import", "lora", "-o", "pair.safetensors", "--json")
    facts = json.loads(out)
    assert status == 0
    assert sorted(facts["concepts"], key=lambda c: c["name"]) == [
        {"name": "one", "weight": 0.5},
        {"name": "two", "weight": 1.0},
    ]
    assert read_concept_set("pair.safetensors").digest == facts["digest"]


def test_an_ordinary_lora_is_projected_and_its_loss_shown(sbora, thin, files, tmp_path):
    model = copy.deepcopy(thin.pipeline.unet)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "proj_in"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    adapted.save_pretrained(str(tmp_path / "my style" / "unet"))
    command = ("import", "my style", "--project", files / "one.safetensors", "-o", "c.safetensors")
    status, out, _ = sbora(*command)
    assert status == 0
    shown = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in out.splitlines()[1:-1]}
    assert {"cross-attention", "self-attention", "other layers", "all"} == shown.keys()
    assert shown["other layers"][1:] == ["0", "100.0%"] and 80 < float(shown["all"][2][:-1]) < 100
    status, out, _ = sbora(*command, "--name", "style", "--json")
    facts, concept = json.loads(out), read_concept("c.safetensors")
    assert (facts["name"], facts["loss"]["other layers"]) == ("style", 1.0)
    assert concept.meta.name == "style" and concept.meta.digest == facts["digest"]
    assert all(layer.endswith(("to_q", "to_k")) for layer in concept.layers)


def test_a_folder_of_the_peft_tuner_needs_its_base(sbora, thin, tmp_path):
    config = SboraConfig(r=4, slot=1, target_modules=["to_q"], name_prefix="unet.")
    get_peft_model(copy.deepcopy(thin.pipeline.unet), config).save_pretrained(str(tmp_path / "mug"))
    assert refused(sbora("import", "mug", "-o", "mug.safetensors"), "--base")
    words = ("--base", "pocket", "--class-noun", "cup")
    assert sbora("import", "mug", "-o", "mug.safetensors", *words)[0] == 0
    meta = read_concept("mug.safetensors").meta
    assert (meta.name, meta.class_noun, meta.start) == ("mug", "cup", 4)


def test_a_published_checkpoint_becomes_a_peft_folder(sbora, tmp_path):
    (tmp_path / "in").mkdir()
    said = {"peft_type": "SBORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(said))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A": torch.tensor([3, 1]), f"{name}.lora_B.weight": torch.ones(4, 2)}
    torch.save(tensors, tmp_path / "in" / "adapter_model.bin")
    status, out, _ = sbora("import", "in", "-o", "out")
    assert status == 0 and "on 1 layers" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_imported_is_refused_in_one_line(sbora, files, tmp_path):
    one = files / "one.safetensors"
    assert refused(sbora("import", "none", "-o", "x.safetensors"), "none does not exist")
    assert refused(sbora("import", one, "-o", "x.safetensors"), "no plain LoRA")
    assert sbora("export", one, "--to", "kohya", "-o", "lora")[0] == 0
    assert refused(sbora("import", "lora", "-o", "x.txt"), "must end in .safetensors")
    onto = ("--project", one, "-o", "x.safetensors")
    assert refused(sbora("import", "lora", *onto, "--name", "a b"), "--name")
    assert refused(sbora("import", "lora", "--project", "nobody", "-o", "x.safetensors"), "nobody")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "X"}))
    assert refused(sbora("import", "peft", "-o", "x.safetensors"), "no configuration of PEFT")
    assert not (tmp_path / "x.safetensors").exists()
