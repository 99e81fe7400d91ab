"""NF4 bases: gradients, the trap of processors with AVX512-BF16, merging without loss."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="NF4 needs the extra 'opt'")

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.llm.adapters import read_adapter
from sbora_diffusion.core.llm.config import LlmConfig
from sbora_diffusion.core.llm.judging import open_model
from sbora_diffusion.core.llm.loading import load_model
from sbora_diffusion.core.llm.merging import (
    load_merged,
    merged_model,
    nf4_model,
    overlaid_model,
)
from sbora_diffusion.core.llm.methods import Adapter, adapted
from sbora_diffusion.core.llm.prompts import Encoder
from sbora_diffusion.core.llm.quantized import Overlaid, dequantized, dequantized_weight
from sbora_diffusion.core.llm.shapes import LINEARS
from sbora_diffusion.core.llm.training import train, write_adapter
from tests.core.llm.tiny import examples, save_base, tokenizer

IDS = torch.arange(1, 33).view(2, 16)
QUICK = LlmConfig(
    method="sbora-fa", rank=4, rate=1e-2, steps=6, batch_size=4, micro_batch_size=4, quantize="nf4"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base")))


def gradients(model, method="sbora-fa") -> dict[str, torch.Tensor]:
    wrapped = adapted(model, Adapter(method, 4, 8.0, 0.0, LINEARS)).train()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
@pytest.mark.parametrize("double", [False, True])
def test_gradients_are_those_of_the_dequantized_model(base, method, double):
    model = load_model(base, "fp32", "nf4", double)
    expected = gradients(dequantized(model, torch.float32), method)
    found = gradients(model, method)
    assert len(found) == 2 * len(LINEARS)
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_an_evaluation_pass_does_not_spoil_the_training_after_it(base):
    """On processors with AVX512-BF16, bitsandbytes would repack the weights in that pass."""
    model = load_model(base, "fp32", "nf4")
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert torch.equal(layer.weight.data, before)
    after = gradients(model)
    expected = gradients(load_model(base, "fp32", "nf4"))
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_the_trap_is_there_on_such_processors(base):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16")
    model = load_model(base, "fp32", "nf4")
    layer = model.model.layers[0].mlp.up_proj
    before, layer.support_avx512bf16_for_cpu = layer.weight.data.clone(), True
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert not torch.equal(layer.weight.data.flatten(), before.flatten())


def test_that_repacking_is_off_on_every_layer(base):
    model = load_model(base, "fp32", "nf4")
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 2 * len(LINEARS)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_dequantized_holds_what_the_layers_multiply_with(base):
    model = load_model(base, "bf16", "nf4", True)
    plain = dequantized(model, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(hasattr(m, "quant_state") for m in plain.modules())


@pytest.fixture(scope="module", params=["sbora-fa", "sbora-fb"])
def tasks(request, base, tmp_path_factory) -> list[Path]:
    """Two adapters in different slots, trained on the NF4 base."""
    folders = []
    rows = Encoder(tokenizer(), "plain", 64).rows(examples())
    for slot in (0, 1):
        place = tmp_path_factory.mktemp("adapter")
        config = QUICK.model_copy(update={"slot": slot, "method": request.param})
        model = load_model(base, "fp32", "nf4")
        done = train(model, tokenizer(), rows, config, place / "c", device="cpu")
        assert done.losses[-1][1] > 0
        record = {"base": base, "training": config.model_dump(mode="json")}
        write_adapter(place / "a", done.model, record)
        folders.append(place / "a")
    return folders


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def test_one_adapter_merges_exactly_in_16_bits_and_as_an_overlay(base, tasks, tmp_path, sbora):
    live = logits(open_model(base, tasks[0]).model)
    task = [read_adapter(tasks[0])]
    torch.testing.assert_close(logits(merged_model(base, task, "fp32")), live, atol=1e-4, rtol=1e-4)
    overlaid = overlaid_model(base, task)
    torch.testing.assert_close(logits(overlaid), live, atol=1e-4, rtol=1e-4)
    folded = merged_model(base, task, "fp32")
    for name, module in overlaid.named_modules():
        if isinstance(module, Overlaid):
            assert torch.equal(module.weight_values(), folded.get_submodule(name).weight)
    status, _, error = sbora("llm", "merge", tasks[0], "--as", "overlay", "-o", tmp_path / "m")
    assert status == 0, error
    assert torch.equal(logits(load_merged(str(tmp_path / "m"))), logits(overlaid))
    assert (tmp_path / "m" / "overlay.safetensors").stat().st_size < 100_000


def test_two_tasks_merge_disjointly_in_any_order(base, tasks):
    a, b = (read_adapter(path) for path in tasks)
    one, two = merged_model(base, [a, b], "bf16"), merged_model(base, [b, a], "bf16")
    names = [name for name, _ in one.named_parameters()]
    assert all(torch.equal(one.get_parameter(n), two.get_parameter(n)) for n in names)
    both = overlaid_model(base, [a, b])
    plain = merged_model(base, [a, b], "fp32")
    for name, module in both.named_modules():
        if isinstance(module, Overlaid):
            assert len(module.at) == 8
            assert torch.equal(module.weight_values(), plain.get_submodule(name).weight)


def test_merging_into_nf4_warns_and_tells_the_loss(base, tasks, tmp_path, sbora):
    task = read_adapter(tasks[0])
    assert nf4_model(base, [read_adapter(tasks[0], 0.05)])[1].lost > 0.3  # a small update
    model, loss = nf4_model(base, [task])
    plain = dequantized(load_model(base, "fp32", "nf4"), torch.float32)
    name = next(iter(task.updates))
    wanted, before = merged_model(base, [task], "fp32"), plain.get_submodule(name).weight
    after = dequantized_weight(model.get_submodule(name))
    assert not torch.equal(after, before)
    assert not torch.equal(after, wanted.get_submodule(name).weight)
    assert loss.lost > 0.05
    assert (loss.changed == 0.0) == (task.updates[name].variant == "fb")  # blocks lie in rows
    status, out, error = sbora(
        "llm", "merge", tasks[0], "--as", "nf4", "-o", tmp_path / "m", "--json"
    )
    assert status == 0 and "--as overlay is exact" in error
    assert json.loads(out)["loss"]["lost"] == pytest.approx(loss.lost)
    torch.testing.assert_close(logits(load_merged(str(tmp_path / "m"))), logits(model))


def test_adapters_of_a_plain_base_have_no_overlay(base, tmp_path):
    rows = Encoder(tokenizer(), "plain", 64).rows(examples())
    config = QUICK.model_copy(update={"quantize": "none", "steps": 1})
    done = train(load_model(base), tokenizer(), rows, config, tmp_path / "c", device="cpu")
    write_adapter(tmp_path / "a", done.model, {"base": base, "training": config.model_dump()})
    for make in (overlaid_model, nf4_model):
        with pytest.raises(ConfigError, match="not trained on an NF4 base"):
            make(base, [read_adapter(tmp_path / "a")])
