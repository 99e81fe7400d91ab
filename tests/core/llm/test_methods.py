"""One table of methods for SBoRA, MoRA and all that PEFT has."""

import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.llm.methods import Adapter, adapted, method_names, trained_parameters
from sbora_diffusion.core.llm.shapes import FIVE
from sbora_diffusion.core.tuner import MoraConfig, MoraLinear, SboraLinear
from sbora_diffusion.core.tuner import mora as mora_module
from tests.core.llm.tiny import tiny_llama

NEEDS = {
    "adalora": {"total_step": 10},
    "c3a": {"block_size": 32},
    "road": {"group_size": 32},
    "trainable-tokens": {"token_indices": [7]},
    "vblora": {"vector_length": 32, "num_vectors": 8},
    "waveft": {"n_frequency": 16},
}
"""What methods want to know of a model this small, or at all."""
REFUSED = {"cpt", "multitask-prompt-tuning", "poly", "xlora"}


def adapter(method: str, **options) -> Adapter:
    return Adapter(method, 4, 8.0, 0.0, FIVE, options=options)


@pytest.mark.parametrize("method", sorted(set(method_names()) - REFUSED))
def test_every_method_trains_its_own_parameters_alone(method):
    if method == "adamss":
        pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    base = tiny_llama()
    names = {name for name, _ in base.named_parameters()}
    torch.manual_seed(0)
    model = adapted(base, adapter(method, **NEEDS.get(method, {})))
    assert trained_parameters(model) > 0
    ids = torch.arange(1, 17).view(2, 8)
    loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}
    assert trained and not {n.removeprefix("base_model.model.") for n in trained} & names


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_methods_that_no_data_here_can_train_say_so(method):
    with pytest.raises(ConfigError, match=f"{method}' needs"):
        adapted(tiny_llama(), adapter(method))


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="'adamss' needs a package that is missing: scikit-learn"):
        adapted(tiny_llama(), adapter("adamss"))


def test_wrong_names_and_values_are_one_line():
    for wanted, told in (
        (adapter("sborafa"), "did you mean 'sbora-fa'"),
        (adapter("lora", lora_alfa=2), "did you mean 'lora_alpha'"),
        (adapter("adalora"), "cannot be put into this model"),
        (Adapter("sbora-fa", 500, 1.0, 0.0, FIVE), "do not fit"),
    ):
        with pytest.raises(Exception, match=told) as caught:
            adapted(tiny_llama(), wanted)
        assert "\n" not in str(caught.value)


def test_language_layers_are_the_image_layers():
    model = adapted(tiny_llama(), adapter("sbora-fb"))
    found = [m for m in model.modules() if isinstance(m, SboraLinear)]
    assert len(found) == 2 * len(FIVE) and {type(m) for m in found} == {SboraLinear}


def random_mora(layer: nn.Linear, rank: int = 2) -> MoraLinear:
    made = MoraLinear(layer, "default", MoraConfig(r=rank))
    nn.init.normal_(made.mora_matrix["default"], std=0.1)
    return made


@pytest.mark.parametrize("inputs, outputs", [(24, 16), (16, 40), (10, 10), (7, 9)])
def test_mora_is_its_delta_weight(inputs, outputs):
    torch.manual_seed(0)
    layer = random_mora(nn.Linear(inputs, outputs))
    x = torch.randn(3, 5, inputs)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_mora_has_loras_parameters_and_a_higher_rank():
    assert mora_module.square_side(4096, 4096, 8) == 256  # the lecture's example
    torch.manual_seed(0)
    layer = random_mora(nn.Linear(64, 64), rank=4)
    assert layer.mora_matrix["default"].numel() == 22 * 22  # LoRA of rank 4 has 512
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) > 4


def test_mora_merges_and_gives_the_base_back():
    torch.manual_seed(0)
    layer = random_mora(nn.Linear(24, 16)).eval()
    x, before = torch.randn(4, 24), layer.base_layer.weight.detach().clone()
    live = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), live, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_mora_saves_and_loads(tmp_path):
    model = adapted(tiny_llama(), adapter("mora")).eval()
    for name, parameter in model.named_parameters():
        if "mora_matrix" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(1, 9)[None]
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_mora_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="r must be 1 or more"):
        MoraConfig(r=0)
    with pytest.raises(ConfigError, match="dropout"):
        MoraConfig(dropout=1.0)
    with pytest.raises(ConfigError, match=r"adapts nn\.Linear"):
        get_peft_model(tiny_llama(), MoraConfig(target_modules=["embed_tokens"]))
