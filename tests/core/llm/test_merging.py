"""Merging adapters into one model, and an adapter as an ordinary LoRA."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sbora_diffusion.core.errors import BaseMismatch, ConflictError
from sbora_diffusion.core.llm.adapters import check_fits, export_lora, read_adapter
from sbora_diffusion.core.llm.merging import merged_model
from sbora_diffusion.core.llm.methods import Adapter, adapted
from sbora_diffusion.core.llm.shapes import LINEARS
from sbora_diffusion.core.llm.training import write_adapter
from tests.core.llm.tiny import save_base, tiny_llama

ROOT = Path(__file__).parents[3]
IDS = torch.arange(1, 17).view(2, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """Write an adapter with random factors: (method, slot) → its folder."""
    seeds = count()

    def made(method: str = "sbora-fa", slot: int = 0) -> Path:
        adapter = Adapter(method, 4, 8.0, 0.0, LINEARS, slot=slot)
        model = adapted(AutoModelForCausalLM.from_pretrained(base), adapter)
        generator = torch.Generator().manual_seed(next(seeds))
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        place = tmp_path_factory.mktemp("adapter") / "a"
        write_adapter(place, model, {"base": base, "training": {"dtype": "fp32"}})
        return place

    return made


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def with_adapter(base: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb", "lora", "mora"])
def test_a_merged_model_is_the_adapted_one(base, make, method, tmp_path, sbora):
    folder = make(method)
    status, _, error = sbora("llm", "merge", folder, "-o", tmp_path / "m", "--dtype", "fp32")
    assert status == 0, error
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), with_adapter(base, folder), atol=1e-4, rtol=1e-4)
    assert merged.config.use_cache
    assert json.loads((tmp_path / "m" / "sbora.json").read_text())["form"] == "16-bit"


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_tasks_in_different_slots_merge_exactly_in_any_order(base, make, method):
    paths = [make(method, slot) for slot in range(3)]
    tasks = [read_adapter(path, 0.5) for path in paths]
    one, two = (merged_model(base, order, "bf16") for order in (tasks, tasks[::-1]))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layer = "model.layers.0.mlp.up_proj"
    owned = sorted(set().union(*(task.updates[layer].members for task in tasks)))
    dim = 1 if method == "sbora-fa" else 0
    rest = torch.tensor([i for i in range(64 if dim else 128) if i not in owned])
    assert len(owned) == 12
    for name, weight in one.named_parameters():
        assert torch.equal(weight, two.get_parameter(name))
    before, after = (m.get_submodule(layer).weight for m in (plain, one))
    assert torch.equal(after.index_select(dim, rest), before.index_select(dim, rest))
    assert not torch.equal(after, before)


def test_overlapping_tasks_are_refused_and_can_be_added(base, make, tmp_path, sbora):
    a, b = make(slot=0), make(slot=0)
    with pytest.raises(ConflictError, match="share 56 indices"):
        merged_model(base, [read_adapter(a), read_adapter(b)])
    status, _, error = sbora("llm", "merge", a, b, "-o", tmp_path / "m")
    assert status == 2 and "another --slot" in error and not (tmp_path / "m").exists()
    assert sbora("llm", "merge", a, f"{b}:0.5", "-o", tmp_path / "m", "--allow-overlap")[0] == 0


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_an_export_loads_without_this_package_and_gives_the_same_logits(
    base, make, method, tmp_path, sbora
):
    folder, out, file = make(method), tmp_path / "lora", tmp_path / "logits.pt"
    assert sbora("llm", "export", folder, "-o", out)[0] == 0
    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(out)!r}).eval()\n"
        "assert not any(name.startswith('sbora') for name in sys.modules)\n"
        f"torch.save(model(torch.arange(1, 17).view(2, 8)).logits, {str(file)!r})\n"
    )
    if method == "sbora-fa":
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", check=True)
        found = torch.load(file)
    else:
        found = with_adapter(base, out)
    torch.testing.assert_close(found, with_adapter(base, folder), atol=1e-5, rtol=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_an_exports_update_is_the_adapters_bit_for_bit(base, make, tmp_path):
    task = read_adapter(make("sbora-fb", 2))
    export_lora(task, tiny_llama(), tmp_path / "lora")
    live = PeftModel.from_pretrained(tiny_llama(), task.path)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    for layer in task.updates:
        a, b = (m.base_model.model.get_submodule(layer) for m in (live, lora))
        assert torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default"))


def test_what_does_not_fit_is_one_line(base, make, tmp_path, sbora):
    with pytest.raises(BaseMismatch, match="was trained on another model"):
        check_fits(read_adapter(make()), tiny_llama(width=128))
    wide = save_base(tmp_path / "wide", width=128)
    for command, told in (
        (("merge", make(), "--base", wide), "was trained on another model"),
        (("merge", tmp_path), "holds no adapter"),
        (("merge", make(), "--as", "8-bit"), "is unknown"),
        (("merge", make(), "--as", "nf4"), "not trained on an NF4 base"),
        (("merge", f"{make()}:heavy"), "is no weight"),
        (("export", make("lora")), "not SBoRA's"),
        (("export", make(), "--base", wide), "was trained on another model"),
    ):
        status, _, error = sbora("llm", *command, "-o", tmp_path / "out")
        assert status == 2 and told in error, error
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_damaged_adapters_are_refused(make, tmp_path, sbora):
    folder = make()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    status, _, error = sbora("llm", "merge", folder, "-o", tmp_path / "out")
    assert status == 2 and "cannot be read" in error and error.count("\n") == 1
