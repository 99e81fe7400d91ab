"""Bases from folders, files and the hub: loaded, or refused in one line."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import FromSingleFileMixin
from safetensors.torch import save_file

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, FormatError, ResourceError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.diffusion.bases import POCKET, Base, load_base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw, draw_latents
from tests.diffusion.ldm_names import whole_file
from tests.diffusion.thin_sd15 import thin_sd15
from tests.diffusion.thin_sdxl import thin_sdxl


def refusal(reference, kind, **options):
    with pytest.raises(kind) as caught:
        load_base(str(reference), **{"device": "cpu", **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_pocket_is_recognised_and_ready_for_inference(pocket):
    assert (pocket.family, pocket.public_name, pocket.resolution) == ("pocket", "pocket", 128)
    assert pocket.key.startswith("pocket-") and pocket.device.type == "cpu"
    for model in (pocket.pipeline.unet, pocket.pipeline.vae, pocket.pipeline.text_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_copy_in_another_folder_is_the_same_base_without_a_public_name(pocket, tmp_path):
    copy = load_base(str(shutil.copytree(POCKET, tmp_path / "copy")), "cpu")
    assert copy.fingerprint == pocket.fingerprint and copy.key == pocket.key
    assert copy.public_name == ""


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "file.ckpt"])
def test_a_reference_to_nothing_says_what_can_be_given(name):
    assert "give 'pocket', a folder" in refusal(name, ConfigError)


def test_a_folder_without_a_model_and_one_with_a_broken_model_are_refused(tmp_path):
    assert "has no model_index.json" in refusal(tmp_path, FormatError)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path, FormatError)
    broken = shutil.copytree(POCKET, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    assert "broken cannot be read" in refusal(broken, FormatError)


def test_a_hub_id_that_cannot_be_fetched_says_so():
    message = refusal("nobody/no-such-model", ResourceError)
    assert "cannot be fetched from the hub; check the name" in message


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "b.safetensors").write_bytes(b"x" * 50)
    save_file({"weight": torch.zeros(3)}, tmp_path / "c.safetensors")
    assert "not a .safetensors file" in refusal(tmp_path / "a.ckpt", FormatError)
    for name in ("b", "c"):
        assert "cannot be read as a checkpoint" in refusal(
            tmp_path / f"{name}.safetensors", FormatError
        )


V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
FILES = {
    "StableDiffusionPipeline": {"weight": (3,)},
    "StableDiffusionPipeline of 2": {V2: (320, 1024)},
    "StableDiffusionXLPipeline": {XL: (1280,)},
}


@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint_is_read_by_the_pipeline_of_its_family(pocket, tmp_path, monkeypatch, kind):
    asked = []

    def read(cls, *args, **options):
        asked.append((cls.__name__, options.get("config")))
        return pocket.pipeline

    monkeypatch.setattr(FromSingleFileMixin, "from_single_file", classmethod(read))
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FILES[kind].items()}, file)
    load_base(str(file), "cpu")
    assert asked == [(kind.partition(" ")[0], None)]


def test_a_folder_beside_a_checkpoint_gives_its_configurations(pocket, tmp_path, monkeypatch):
    asked = []

    def read(cls, *args, **options):
        asked.append((cls.__name__, options["config"], options["local_files_only"]))
        return pocket.pipeline

    monkeypatch.setattr(FromSingleFileMixin, "from_single_file", classmethod(read))
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    (tmp_path / "model").mkdir()
    index = {"_class_name": "StableDiffusion3Pipeline"}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    load_base(str(tmp_path / "model.safetensors"), "cpu")
    assert asked == [("StableDiffusion3Pipeline", str(tmp_path / "model"), True)]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_checkpoint_is_the_base_that_its_folder_is(pocket, tmp_path, family):
    """Every weight of it, in the names of Stability's code."""
    thin_in_stabilitys_blocks(family, pocket).save_pretrained(tmp_path / "model")
    folder = load_base(str(tmp_path / "model"), "cpu")
    save_file(whole_file(folder.pipeline), tmp_path / "model.safetensors")
    file = load_base(str(tmp_path / "model.safetensors"), "cpu")
    assert (file.family, file.key) == (folder.family, folder.key) and file.family == family
    drawn = [draw(base, ["a cat"], [0], steps=1)[0].tobytes() for base in (folder, file)]
    assert drawn[0] == drawn[1]


def thin_in_stabilitys_blocks(family: str, pocket):
    """Thin, but with as many layers in a block as Stability's checkpoints have."""
    pipeline = thin_sdxl(pocket)
    if family == "sdxl":
        return pipeline
    base = thin_sd15(pocket)
    config = pipeline.unet.config
    kinds = {key: config[key] for key in ("down_block_types", "up_block_types", "norm_num_groups")}
    base.pipeline.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 32), layers_per_block=2,
        cross_attention_dim=768, attention_head_dim=4, **kinds,
    )  # fmt: skip
    return base.pipeline


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({key: torch.zeros(320, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    message = refusal(tmp_path / "inpainting.safetensors", FormatError)
    assert "a checkpoint of another kind: inpainting; known families: pocket, sd1" in message


def test_a_device_that_is_not_there_is_refused():
    assert "'nonsense' cannot be used" in refusal("pocket", ConfigError, device="nonsense")


def test_an_unknown_precision_is_refused():
    assert "fp32, fp16 or bf16" in refusal("pocket", ConfigError, dtype="fp8")


def test_a_model_of_an_unknown_family_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.diffusion.families.FAMILIES", ())
    assert "cross-attention width 192" in refusal("pocket", FormatError)


@pytest.fixture(scope="module")
def rounded() -> Base:
    return load_base("pocket", "cpu", "bf16")


def test_a_rounded_base_accepts_a_concept_with_a_warning_and_draws(rounded, tiny_concepts):
    live = ConceptPipeline(rounded)
    assert live.add(read_concept(tiny_concepts["plushbear"])) is True
    found = draw_latents(rounded, ["a <plushbear>"], [0], steps=1)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    live.remove("plushbear")


def test_the_rounded_relation_holds_both_ways_and_the_stored_precision_is_the_same(pocket, rounded):
    assert compare(pocket.fingerprint, rounded.fingerprint) == "rounded"
    assert compare(rounded.fingerprint, pocket.fingerprint) == "rounded"
    half = load_base("pocket", "cpu", "fp16")  # pocket is stored in fp16: nothing is rounded
    assert compare(pocket.fingerprint, half.fingerprint) == "same"


def test_a_base_with_one_other_weight_is_another_base(pocket, tmp_path):
    changed = dict(pocket.fingerprint)
    changed[min(changed)] = "f" * 48
    with pytest.raises(BaseMismatch, match="1 of 72 adapted layers are different"):
        compare(pocket.fingerprint, changed)


def test_pocket_names_no_path_and_loads_in_one_precision_in_stock_diffusers():
    assert "_name_or_path" not in json.loads((POCKET / "model_index.json").read_text())
    pipeline = StableDiffusionPipeline.from_pretrained(
        POCKET, safety_checker=None, local_files_only=True
    )
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
