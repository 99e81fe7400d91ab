"""Checkpoints in the format of the published SBoRA code become adapters that PEFT loads."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.core.published import import_published, is_published

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))


def published(model, folder, variant, **changes):
    """As the published code writes it: indices at random, in no order, as int64."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for path, linear in model.named_modules():
        if path.endswith(MODULES):
            name = f"base_model.model.{path}"
            outputs, inputs = linear.weight.shape
            width = inputs if variant == "fa" else outputs
            indices = torch.randperm(width, generator=generator)[:RANK]
            fixed, trained = ("lora_A", "lora_B") if variant == "fa" else ("lora_B", "lora_A")
            shape = (outputs, RANK) if variant == "fa" else (RANK, inputs)
            tensors[f"{name}.{fixed}"] = indices
            tensors[f"{name}.{trained}.weight"] = torch.randn(shape, generator=generator)
    config = {
        "adapter_name": f"sbora_{variant}",
        "base_model_name_or_path": "somebody/llama",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "SBORA",
        "r": RANK,
        "target_modules": list(MODULES),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return tensors


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("changes", [{}, {"peft_type": "LORA"}], ids=["published", "quantized"])
def test_peft_merges_exactly_the_published_update(model, tmp_path, variant, changes):
    tensors = published(model, tmp_path / "in", variant, **changes)
    assert is_published(tmp_path / "in")
    assert import_published(tmp_path / "in", tmp_path / "out") == 4
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out"))
    merged = loaded.merge_and_unload()
    for path, linear in model.named_modules():
        if not path.endswith(MODULES):
            continue
        name, expected = f"base_model.model.{path}", linear.weight.detach().clone()
        if variant == "fa":
            update = tensors[f"{name}.lora_B.weight"] * (ALPHA / RANK)
            expected.index_add_(1, tensors[f"{name}.lora_A"], update)
        else:
            update = tensors[f"{name}.lora_A.weight"] * (ALPHA / RANK)
            expected.index_add_(0, tensors[f"{name}.lora_B"], update)
        assert torch.equal(merged.get_submodule(path).weight, expected)


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return type(self.canary).touch, (self.canary,)


def test_no_code_comes_out_of_a_checkpoint(model, tmp_path):
    published(model, tmp_path / "in", "fa")
    canary = tmp_path / "canary"
    for data in (pickle.dumps({"a": Runs(canary)}), b"hello", b""):
        (tmp_path / "in" / "adapter_model.bin").write_bytes(data)
        with pytest.raises(FormatError, match="more than tensors"):
            import_published(tmp_path / "in", tmp_path / "out")
    torch.save({"a": Runs(canary)}, tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(FormatError, match="more than tensors"):
        import_published(tmp_path / "in", tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


def broken(tensors, kind):
    key = next(key for key in tensors if key.endswith(".lora_A"))
    module = key.removesuffix(".lora_A")
    if kind == "missing":
        del tensors[key]
    elif kind == "unknown":
        tensors["other"] = torch.ones(1)
    elif kind == "repeated":
        tensors[key] = torch.zeros(RANK, dtype=torch.int64)
    elif kind == "negative":
        tensors[key] = torch.arange(RANK) - 1
    elif kind == "floats":
        tensors[key] = tensors[key].float()
    elif kind == "shape":
        tensors[f"{module}.lora_B.weight"] = torch.ones(16, RANK + 1)
    else:
        tensors[f"{module}.lora_B.weight"] = torch.full((16, RANK), torch.nan)
    return tensors


@pytest.mark.parametrize(
    "kind", ["missing", "unknown", "repeated", "negative", "floats", "shape", "nan"]
)
def test_tensors_that_do_not_fit_are_refused(model, tmp_path, kind):
    tensors = published(model, tmp_path / "in", "fa")
    torch.save(broken(tensors, kind), tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(FormatError):
        import_published(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{"peft_type": "IA3"}, {"r": "4"}, {"lora_alpha": None}, {"fan_in_fan_out": True}]
)
def test_other_configurations_are_refused(model, tmp_path, changes):
    published(model, tmp_path / "in", "fa", **changes)
    with pytest.raises(FormatError, match="no configuration of SBoRA"):
        import_published(tmp_path / "in", tmp_path / "out")


def test_a_list_instead_of_tensors_is_refused(model, tmp_path):
    published(model, tmp_path / "in", "fa")
    torch.save([1, 2], tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(FormatError, match="no table of tensors"):
        import_published(tmp_path / "in", tmp_path / "out")
