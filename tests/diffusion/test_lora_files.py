"""Exports in the tools that read them: stock diffusers, PEFT; and what each tool trips over."""

import copy
import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from sbora_diffusion.core.concept import sealed
from sbora_diffusion.core.errors import ConfigError, FormatError, IntegrityError
from sbora_diffusion.core.lora import lora_layers
from sbora_diffusion.core.schema import Concept
from sbora_diffusion.diffusion import lora_files
from sbora_diffusion.diffusion.formats import LORA_FILE, write_lora
from sbora_diffusion.diffusion.lora_files import read_lora
from sbora_diffusion.diffusion.targets import adaptable, name_prefix, target_layers
from tests.diffusion.lora_examples import concept_for, folded, loaded
from tests.diffusion.thin_families import thin_family
from tests.diffusion.thin_pocket import thin_pocket
from tests.diffusion.thin_sdxl import thin_sdxl


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def stock(request, pocket):
    """Family and pipeline: one text encoder, or two of which one has a projection."""
    if request.param == "sd":
        return "pocket", thin_pocket(pocket).pipeline
    return "sdxl", thin_sdxl(pocket)


@pytest.fixture(scope="module")
def pairs(stock):
    """Two disjoint FA concepts of different rank and alpha."""
    family, pipeline = stock
    return [
        (concept_for(pipeline, "one", family, alpha=2.0), 0.7),
        (concept_for(pipeline, "two", family, rank=3, slot=2, alpha=6.0), -0.4),
    ]


def refuse_difference(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_stock_diffusers_fuses_the_folded_model_bit_for_bit(stock, pairs, form, tmp_path):
    _, pipeline = stock
    for number, concepts in enumerate((pairs, [(pairs[0][0], 1.0)])):
        folder = tmp_path / str(number)
        write_lora(folder, concepts, form=form)
        (file,) = folder.glob("*.safetensors")
        refuse_difference(loaded(pipeline, folder, file.name), folded(pipeline, concepts))


def test_peft_loads_each_folder_and_merges_the_folded_layers_bit_for_bit(stock, pairs, tmp_path):
    _, pipeline = stock
    write_lora(tmp_path / "lora", pairs, form="peft")
    refuse_difference(merged_by_peft(pipeline, tmp_path / "lora"), folded(pipeline, pairs))


def merged_by_peft(pipeline, folder):
    """The attention weights of models into which PEFT merged their folders."""
    found = {}
    for part, original in adaptable(pipeline):
        model, prefix = copy.deepcopy(original), name_prefix(part, original)
        PeftModel.from_pretrained(model, str(folder / part)).merge_and_unload()
        for path, module in model.named_modules():
            if prefix + path in target_layers(pipeline):
                found[prefix + path] = module.weight
    return found


def test_a_transformer_goes_to_diffusers_and_peft_and_kohya_has_no_names_for_it(pocket, tmp_path):
    pipeline = thin_family("sd3", pocket).pipeline
    pairs = [(concept_for(pipeline, "one", "sd3", alpha=2.0), 0.7)]
    pairs += [(concept_for(pipeline, "two", "sd3", rank=3, slot=2), 0.5)]
    expected = folded(pipeline, pairs)
    for form in ("diffusers", "peft"):
        write_lora(tmp_path / form, pairs, form=form)
    refuse_difference(loaded(pipeline, tmp_path / "diffusers", LORA_FILE), expected)
    refuse_difference(merged_by_peft(pipeline, tmp_path / "peft"), expected)
    with pytest.raises(ConfigError, match="--to diffusers"):
        write_lora(tmp_path / "kohya", pairs, form="kohya")
    assert not (tmp_path / "kohya").exists()


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_what_is_read_back_is_what_was_written(stock, pairs, form, tmp_path):
    write_lora(tmp_path / "lora", pairs, form=form)
    found = read_lora(tmp_path / "lora")
    written = lora_layers(pairs)
    assert found.layers.keys() == written.keys()
    for name, lora in written.items():
        other = found.layers[name]
        assert torch.equal(lora.down, other.down) and torch.equal(lora.up, other.up)
        assert other.scale == 1.0
    assert found.metadata["modelspec.trigger_phrase"] == "<one> <two>"


def test_concepts_on_different_layers_keep_one_rank_everywhere(stock, pairs, tmp_path):
    """diffusers drops alphas that differ between layers of a flattened text encoder."""
    _, pipeline = stock
    first, second = (concept for concept, _ in pairs)
    only = {name: x for name, x in second.layers.items() if name.startswith("unet.")}
    meta = second.meta.model_copy(
        update={
            "widths": {name: second.meta.widths[name] for name in only},
            "fingerprint": {name: second.meta.fingerprint[name] for name in only},
        }
    )
    concepts = [(first, 0.5), (sealed(Concept(meta, only, second.embeddings)), 1.0)]
    write_lora(tmp_path / "lora", concepts, form="kohya")
    fused = loaded(pipeline, tmp_path / "lora", "one+two.safetensors")
    refuse_difference(fused, folded(pipeline, concepts))


def test_trap_diffusers_own_converter_writes_names_and_alphas_that_are_wrong(pairs, tmp_path):
    """Why there is a converter here: the names lack `text_model` once transformers drops it, the
    prefix is SDXL's for every model, and alpha is the rank."""
    (concept, _), _ = pairs
    lora = lora_layers([(concept, 1.0)])
    flattened = {
        key.replace("text_encoder.text_model.", "text_encoder."): value
        for name, own in lora.items()
        for key, value in ((f"{name}.lora_A.weight", own.down), (f"{name}.lora_B.weight", own.up))
    }
    theirs = convert_state_dict_to_kohya(flattened)
    ours = lora_files.kohya_tensors(lora, concept.meta.family)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    prefix = "lora_te1" if concept.meta.family == "sdxl" else "lora_te"
    name = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
    assert f"{name}.alpha" in ours and f"{name}.alpha" not in theirs
    assert ours[f"{name}.alpha"].item() == concept.meta.alpha == 2.0 != lora[layer].rank
    alphas = {value.item() for key, value in theirs.items() if key.endswith(".alpha")}
    assert alphas == {4}


def test_trap_alpha_keys_and_metadata_in_one_file_are_refused_by_diffusers(stock, pairs, tmp_path):
    _, pipeline = stock
    for form in ("kohya", "diffusers"):
        write_lora(tmp_path / form, pairs, form=form)
        (file,) = (tmp_path / form).glob("*.safetensors")
        tensors, metadata = lora_files.load_tensors(file)
        assert any(key.endswith(".alpha") for key in tensors) == (form == "kohya")
        assert "lora_adapter_metadata" not in metadata
    both = {"lora_adapter_metadata": json.dumps({"unet.r": 7, "unet.lora_alpha": 7})}
    save_file(
        load_file(tmp_path / "kohya" / "one+two.safetensors"), tmp_path / "x.safetensors", both
    )
    with pytest.raises(ValueError, match="Both `network_alphas` and `metadata`"):
        pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")


def test_trap_a_file_with_diffusers_keys_needs_no_alpha(pairs, tmp_path):
    """Without one every reader scales by 1, so the scale stands in the factors."""
    concept, _ = pairs[0]
    write_lora(tmp_path / "lora", [(concept, 0.7)], form="diffusers")
    tensors, _ = lora_files.load_tensors(tmp_path / "lora" / LORA_FILE)
    for name, lora in lora_layers([(concept, 0.7)]).items():
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert torch.equal(up @ down, lora.delta())
        assert torch.equal(up, concept.layers[name].factor)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_trap_an_export_that_reads_back_differently_is_refused_and_nothing_is_left(
    pairs, form, tmp_path, monkeypatch
):
    def renamed(name):
        return name.replace("attn2", "attn3")

    monkeypatch.setattr(lora_files, "canonical_name", renamed)
    with pytest.raises(IntegrityError, match="read back differently"):
        write_lora(tmp_path / "lora", pairs, form=form)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_have_the_names_that_other_tools_look_for(stock, pairs, tmp_path):
    family, pipeline = stock
    files = write_lora(tmp_path / "lora", pairs, form="kohya")
    assert [file.name for file in files] == ["one.safetensors", "two.safetensors"]
    concept, content = pairs[0][0], load_file(files[0])
    if family == "sdxl":
        assert torch.equal(content["clip_l"], concept.embeddings["text_encoder.<one>"])
        assert torch.equal(content["clip_g"], concept.embeddings["text_encoder_2.<one>"])
        assert len(content) == 2
        return
    ((name, rows),) = content.items()
    assert name == "<one>" and torch.equal(rows, concept.embeddings["text_encoder.<one>"])
    copied = copy.copy(pipeline)
    copied.tokenizer = copy.deepcopy(pipeline.tokenizer)
    copied.text_encoder = copy.deepcopy(pipeline.text_encoder)
    copied.load_textual_inversion(str(files[0]))
    ids = copied.tokenizer.convert_tokens_to_ids(["<one>", "<one>_1"])
    assert torch.equal(copied.text_encoder.get_input_embeddings().weight[ids], rows)


def test_the_metadata_are_what_other_tools_show(pairs, tmp_path):
    concept = pairs[0][0]
    write_lora(tmp_path / "lora", [(concept, 1.0)], form="kohya")
    _, metadata = lora_files.load_tensors(tmp_path / "lora" / "one.safetensors")
    sdxl = concept.meta.family == "sdxl"
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora" if sdxl else "pocket/lora",
        "modelspec.title": "one",
        "modelspec.resolution": "1024x1024" if sdxl else "128x128",
        "modelspec.trigger_phrase": "<one>",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "pocket",
        "ss_output_name": "one",
    }
    assert expected.items() <= metadata.items()
    assert len(metadata["sshs_model_hash"]) == 64
    readme = (tmp_path / "lora" / "README.md").read_text()
    assert "<lora:one:1>" in readme and "embedding:one" in readme and "`<one>`" in readme


@pytest.mark.parametrize("extra", ["dora_scale", "hada_w1_a", "lora_mid.weight"])
def test_other_adapters_are_refused_by_their_tensors(pairs, tmp_path, extra):
    write_lora(tmp_path / "lora", pairs, form="kohya")
    file = tmp_path / "lora" / "one+two.safetensors"
    save_file(load_file(file) | {f"lora_unet_x.{extra}": torch.ones(1)}, file)
    with pytest.raises(FormatError, match=extra):
        read_lora(file)


def test_files_without_loras_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(FormatError, match="not a safetensors file"):
        read_lora(tmp_path / "text.safetensors")
    with pytest.raises(FormatError, match="safetensors file"):
        read_lora(tmp_path / "missing.safetensors")
    save_file({"a.lora_down.weight": torch.ones(1, 1)}, tmp_path / "half.safetensors")
    with pytest.raises(FormatError, match="without both factors"):
        read_lora(tmp_path / "half.safetensors")
    with pytest.raises(FormatError, match=r"2 \.safetensors files"):
        read_lora(tmp_path)


DOWN, UP = "unet.a.lora_A.weight", "unet.a.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({DOWN: torch.ones(3)}, {}),
        ({DOWN: torch.ones(3, 4)}, {}),
        ({DOWN: torch.ones(0, 4), UP: torch.ones(4, 0)}, {}),
        ({DOWN: torch.ones(2, 4, dtype=torch.int64)}, {}),
        ({"unet.a.alpha": torch.ones(2)}, {}),
        ({}, {"lora_adapter_metadata": "{"}),
        ({}, {"lora_adapter_metadata": "7"}),
        ({}, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}),
        ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'}),
        ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, change, said):
    tensors = {DOWN: torch.ones(2, 4), UP: torch.ones(4, 2)} | change
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", **said})
    with pytest.raises(FormatError):
        read_lora(tmp_path / "x.safetensors")


def test_alpha_is_read_wherever_it_is_said(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(4, 3),
        f"{layer}.lora_B.weight": torch.ones(2, 4),
    }
    cases = {
        "none": ({}, {}, 1.0),
        "tensor": ({f"{layer}.alpha": torch.tensor(2.0)}, {}, 0.5),
        "metadata": ({}, {"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        "pattern": (
            {},
            {"unet.lora_alpha": 8, "unet.alpha_pattern": {layer.removeprefix("unet."): 1}},
            0.25,
        ),
        "rslora": ({}, {"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
    }
    for name, (more, said, scale) in cases.items():
        metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {"format": "pt"}
        file = tmp_path / f"{name}.safetensors"
        save_file(factors | more, file, metadata)
        assert read_lora(file).layers[layer].scale == scale, name


def test_a_peft_folder_of_another_kind_is_refused(tmp_path):
    LoraConfig(use_dora=True, target_modules=["to_q"]).save_pretrained(str(tmp_path))
    with pytest.raises(FormatError, match="no plain LoRA"):
        read_lora(tmp_path)
