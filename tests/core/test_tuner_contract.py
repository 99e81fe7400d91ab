"""What PEFT and transformers do with an SBoRA adapter, on a tiny text encoder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter

from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from tests.core.tuner_models import (
    TEXT,
    VARIANTS,
    all_bytes,
    encode,
    randomize,
    text_config,
    tiny_text,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_new_adapter_changes_nothing_and_only_factors_train(variant):
    base = tiny_text()
    expected = encode(base)
    model = get_peft_model(base, text_config(variant=variant))
    assert torch.equal(encode(model), expected)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 8
    assert all(".sbora_factor." in n for n in trainable)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_save_and_load_differ_by_nothing(tmp_path, variant):
    model = get_peft_model(tiny_text(), text_config(3, variant, alpha=6.0)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_text(), tmp_path).eval()
    assert torch.equal(encode(loaded), encode(model))
    assert loaded.peft_config["default"].index_range == (12, 16)


def test_peft_a_loaded_adapter_keeps_its_own_indices(tmp_path):
    model = get_peft_model(tiny_text(), text_config(1)).eval()
    randomize(model)
    for module in model.modules():
        if isinstance(module, SboraLinear):
            module.sbora_indices["default"] = module.sbora_indices["default"].flip(0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_text(), tmp_path).eval()
    assert torch.equal(encode(loaded), encode(model))


def test_peft_saved_configuration_is_sorted(tmp_path):
    get_peft_model(tiny_text(), text_config()).save_pretrained(tmp_path)
    loaded = SboraConfig.from_pretrained(tmp_path)
    assert loaded.target_modules == sorted(TEXT)
    assert loaded.peft_type == "SBORA"


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_several_adapters_switch_disable_and_delete(variant):
    base = tiny_text()
    plain = encode(base)
    model = get_peft_model(base, text_config(0, variant), "cat")
    model.add_adapter("dog", text_config(1, variant))
    randomize(model)
    a = encode(model)
    model.set_adapter("dog")
    b = encode(model)
    model.base_model.set_adapter(["cat", "dog"])
    both = encode(model)
    with model.disable_adapter():
        assert torch.equal(encode(model), plain)
    assert torch.equal(encode(model), both)
    assert len({t.numpy().tobytes() for t in (plain, a, b, both)}) == 4
    model.delete_adapter("cat")
    assert torch.equal(encode(model), b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_merge_and_unmerge_are_exact(variant):
    base = tiny_text()
    before = all_bytes(base)
    model = get_peft_model(base, text_config(0, variant), "cat")
    model.add_adapter("dog", text_config(1, variant))
    randomize(model)
    model.base_model.set_adapter(["cat", "dog"])
    live = encode(model)
    model.merge_adapter()
    torch.testing.assert_close(encode(model), live, atol=1e-5, rtol=1e-5)
    assert all_bytes(model) != before
    model.unmerge_adapter()
    assert all_bytes(model) == before


def test_peft_merge_and_unload_gives_the_same_bytes_in_any_order():
    def merged(*order: str) -> dict[str, bytes]:
        model = get_peft_model(tiny_text(), text_config(0), "cat")
        model.add_adapter("dog", text_config(1, "fb"))
        randomize(model)
        result = model.merge_and_unload(adapter_names=list(order))
        assert not any(isinstance(m, SboraLinear) for m in result.modules())
        return all_bytes(result)

    assert merged("cat", "dog") == merged("dog", "cat")


def test_peft_trains_token_rows_beside_the_factors(tmp_path):
    model = get_peft_model(tiny_text(), text_config(trainable_token_indices=[7, 9])).eval()
    model(input_ids=torch.arange(1, 15)[None]).last_hidden_state.square().sum().backward()
    with_grad = [n for n, p in model.named_parameters() if p.grad is not None]
    assert any("trainable_tokens_delta" in n for n in with_grad)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.5
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_text(), tmp_path).eval()
    assert torch.equal(encode(loaded), encode(model))
    torch.testing.assert_close(encode(model.merge_and_unload()), encode(loaded))


def test_peft_modules_to_save_and_exclude_modules():
    config = text_config(modules_to_save=["final_layer_norm"], exclude_modules=["v_proj"])
    model = get_peft_model(tiny_text(), config)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("final_layer_norm.modules_to_save" in n for n in trainable)
    assert not any("v_proj" in n for n in trainable)


def test_peft_half_base_keeps_an_fp32_factor():
    model = get_peft_model(tiny_text().bfloat16(), text_config())
    dtypes = {p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert encode(model).dtype == torch.bfloat16


def test_peft_low_memory_loading_gives_the_same_output(tmp_path):
    model = get_peft_model(tiny_text(), text_config(1)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_text(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(encode(loaded), encode(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_converts_to_an_ordinary_lora(variant):
    model = get_peft_model(tiny_text(), text_config(1, variant, alpha=6.0)).eval()
    randomize(model)
    config, state = convert_to_lora(model, rank=4)
    lora = get_peft_model(tiny_text(), config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(encode(lora), encode(model), atol=1e-4, rtol=1e-4)


def test_peft_hot_swapping_is_for_lora_alone_and_its_refusal_changes_nothing(tmp_path):
    model = get_peft_model(tiny_text(), text_config()).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    expected = encode(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SBORA was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(encode(model), expected)


def test_peft_mixed_models_are_for_methods_that_peft_lists(tmp_path):
    said = "'SBORA' is not compatible with the `PeftMixedModel`"
    with pytest.raises(ValueError, match=said):
        PeftMixedModel(tiny_text(), text_config())
    with pytest.raises(ValueError, match=said):
        get_peft_model(tiny_text(), text_config(), mixed=True)
    get_peft_model(tiny_text(), text_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SBORA is not supported for mixed models"):
        PeftMixedModel.from_pretrained(tiny_text(), tmp_path)


def test_loading_without_the_import_is_a_key_error_that_names_sbora(tmp_path):
    get_peft_model(tiny_text(), text_config()).save_pretrained(tmp_path)
    code = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    print("KeyError", error)
import sbora_diffusion.core.tuner
print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.stdout.split() == ["KeyError", "'SBORA'", "SboraConfig"]


def test_transformers_load_and_delete_adapter(tmp_path):
    model = get_peft_model(tiny_text(), text_config(1)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    text = tiny_text()
    plain = encode(text)
    text.load_adapter(str(tmp_path), adapter_name="concept")
    assert torch.equal(encode(text), encode(model))
    text.disable_adapters()
    assert torch.equal(encode(text), plain)
    text.enable_adapters()
    text.delete_adapter("concept")
    assert torch.equal(encode(text), plain)
