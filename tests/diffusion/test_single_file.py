"""Concepts folded into a checkpoint of one file: stock diffusers reads the folded model from it."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from sbora_diffusion.core.errors import (
    BaseMismatch,
    ConfigError,
    ConflictError,
    FormatError,
    IntegrityError,
)
from sbora_diffusion.diffusion import single_file
from sbora_diffusion.diffusion.lora_files import load_tensors
from sbora_diffusion.diffusion.single_file import write_single_file
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.untrained import sd15_unet
from tests.diffusion.ldm_names import single_file as as_single_file
from tests.diffusion.ldm_names import unet_name
from tests.diffusion.lora_examples import concept_for, folded
from tests.diffusion.thin_families import thin_family
from tests.diffusion.thin_sdxl import thin_sdxl


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request, pocket, tmp_path_factory):
    """Family, pipeline, and its weights in one file."""
    family, pipeline = "sdxl", thin_sdxl(pocket)
    if request.param == "sd":
        family, pipeline.text_encoder_2 = "sd1", None
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(as_single_file(pipeline), file, {"modelspec.author": "somebody"})
    return family, pipeline, file


@pytest.fixture(scope="module")
def pairs(model):
    family, pipeline, _ = model
    first = concept_for(pipeline, "one", family, alpha=2.0)
    return [(first, 0.7), (concept_for(pipeline, "rows", family, variant="fb", slot=1), 0.5)]


def test_stock_diffusers_reads_the_folded_weights_out_of_it(model, pairs, tmp_path):
    _, pipeline, base = model
    assert write_single_file(tmp_path / "out", base, pairs) is False
    file, expected = tmp_path / "out" / "one+rows.safetensors", folded(pipeline, pairs)
    pipeline.unet.save_config(tmp_path / "unet")
    unet = UNet2DConditionModel.from_single_file(
        str(file), config=str(tmp_path / "unet"), local_files_only=True
    )
    found = {f"unet.{key}": value for key, value in unet.state_dict().items()}
    tensors = load_file(file)
    found |= first_encoder(tensors, pipeline.text_encoder_2 is not None)
    if pipeline.text_encoder_2 is not None:
        prefix = "conditioner.embedders.1.model."
        clip = convert_open_clip_checkpoint(pipeline.text_encoder_2, tensors, prefix)
        found |= {f"text_encoder_2.{key}": value for key, value in clip.items()}
    wrong = [name for name in expected if not torch.equal(found[f"{name}.weight"], expected[name])]
    assert expected and wrong == []


def first_encoder(tensors, several):
    place = "conditioner.embedders.0." if several else "cond_stage_model."
    clip = convert_ldm_clip_checkpoint(
        {k.replace(place, "cond_stage_model."): v for k, v in tensors.items() if place in k}
    )
    return {
        "text_encoder.text_model." + key.removeprefix("text_model."): value
        for key, value in clip.items()
    }


def test_nothing_else_in_the_file_changes(model, pairs, tmp_path):
    _, pipeline, base = model
    write_single_file(tmp_path / "out", base, pairs)
    before, after = load_file(base), load_file(tmp_path / "out" / "one+rows.safetensors")
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    second = pipeline.text_encoder_2 is not None
    assert len(changed) == len(target_layers(pipeline)) - 2 * second  # q, k, v of open_clip are one
    assert all("attn" in key for key in changed)
    entries = sum((before[key] != after[key]).sum().item() for key in changed)
    assert entries < 0.5 * sum(before[key].numel() for key in changed)
    record = json.loads((tmp_path / "out" / "sbora.json").read_text())
    assert record["rounded_base"] is False and record["dtype"] == "float32"
    _, metadata = load_tensors(tmp_path / "out" / "one+rows.safetensors")
    assert metadata["modelspec.author"] == "somebody"
    assert metadata["modelspec.trigger_phrase"] == "<one> <rows>"
    names = sorted(path.name for path in (tmp_path / "out" / "embeddings").iterdir())
    assert names == ["one.safetensors", "rows.safetensors"]
    assert "models/checkpoints" in (tmp_path / "out" / "README.md").read_text()


def test_a_rounded_copy_of_the_base_is_accepted_and_said(model, pairs, tmp_path):
    _, _, base = model
    half = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(base).items()}, half)
    assert write_single_file(tmp_path / "out", half, pairs) is True
    written = load_file(tmp_path / "out" / "one+rows.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert write_single_file(tmp_path / "wide", base, pairs, dtype=torch.bfloat16) is True
    written = load_file(tmp_path / "wide" / "one+rows.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


def test_other_bases_and_clashes_are_refused_and_nothing_is_left(model, pairs, tmp_path):
    family, pipeline, base = model
    tensors = load_file(base)
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    other = {**tensors, key: tensors[key] + 1}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatch, match="not the base the concept was trained on"):
        write_single_file(tmp_path / "out", tmp_path / "other.safetensors", pairs)
    del other[key]
    save_file(other, tmp_path / "less.safetensors")
    with pytest.raises(BaseMismatch, match="lacks 1 of"):
        write_single_file(tmp_path / "out", tmp_path / "less.safetensors", pairs)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(FormatError):
        write_single_file(tmp_path / "out", tmp_path / "text.safetensors", pairs)
    twin = (concept_for(pipeline, "twin", family), 1.0)
    with pytest.raises(ConflictError, match="share"):
        write_single_file(tmp_path / "out", base, [*pairs, twin])
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_back_differently_is_refused(model, pairs, tmp_path, monkeypatch):
    _, _, base = model
    monkeypatch.setattr(
        single_file,
        "save_file",
        lambda tensors, path, _: save_file(
            {key: torch.zeros_like(value) for key, value in tensors.items()}, path
        ),
    )
    with pytest.raises(IntegrityError, match="read back differently"):
        write_single_file(tmp_path / "out", base, pairs)
    assert list(tmp_path.iterdir()) == []


def test_the_attention_layers_of_sd15_have_their_published_numbers():
    with torch.device("meta"):
        keys = sd15_unet().state_dict()
    names = {unet_name(key, keys) for key in keys}
    for layer in keys:
        if ".attn" in layer and layer.endswith("to_q.weight"):
            (place,) = single_file.places(f"unet.{layer.removesuffix('.weight')}")
            assert place.key.removeprefix("model.diffusion_model.") in names
    found = {tuple(name.split(".")[:2]) for name in names if "attn" in name}
    expected = {("input_blocks", n) for n in "124578"} | {("middle_block", "1")}
    assert found == expected | {("output_blocks", str(n)) for n in range(3, 12)}


def test_the_text_encoder_of_sd2_is_open_clips():
    layer = "text_encoder.text_model.encoder.layers.7.self_attn."
    block = "cond_stage_model.model.transformer.resblocks.7.attn."
    for third, part in enumerate("qkv"):
        assert (f"{block}in_proj_weight", third) in single_file.places(f"{layer}{part}_proj")
    assert (f"{block}out_proj.weight", None) in single_file.places(f"{layer}out_proj")


def test_a_transformer_is_refused(model, pocket, tmp_path):
    _, _, base = model
    concept = concept_for(thin_family("sd3", pocket).pipeline, "one", "sd3")
    with pytest.raises(ConfigError, match=r"not for sd3.*diffusers' layout"):
        write_single_file(tmp_path / "out", base, [(concept, 1.0)])
