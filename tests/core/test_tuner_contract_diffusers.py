"""What diffusers does with an SBoRA adapter, on a tiny UNet, and torch with that UNet."""

from collections.abc import Iterator

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sbora_diffusion.core.tuner import SboraLinear
from tests.core.tuner_models import (
    ATTENTION,
    VARIANTS,
    all_bytes,
    denoise,
    randomize,
    tiny_unet,
    unet_config,
    unet_with,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_add_adapter_starts_at_the_base(variant):
    expected = denoise(tiny_unet())
    unet = tiny_unet()
    unet.add_adapter(unet_config(0, variant), "cat")
    assert torch.equal(denoise(unet), expected)
    randomize(unet)
    assert not torch.equal(denoise(unet), expected)


def test_diffusers_set_adapters_with_weights_scales_the_delta():
    unet = unet_with("cat", "dog")
    unet.set_adapters(["cat", "dog"], [0.25, 0.0])
    weighted = denoise(unet)
    other = unet_with("cat", "dog")
    other.set_adapter("cat")
    for module in other.modules():
        if isinstance(module, SboraLinear):
            module.sbora_factor["cat"].data *= 0.25
    torch.testing.assert_close(weighted, denoise(other), atol=1e-6, rtol=1e-5)


def test_diffusers_per_block_weights_reach_their_blocks():
    unet = unet_with("cat")
    unet.set_adapters(["cat"], [{"down": 0.5, "mid": 0.0, "up": 2.0}])
    scales = {
        name.split("_")[0].split(".")[0]: module.scale("cat")
        for name, module in unet.named_modules()
        if isinstance(module, SboraLinear)
    }
    assert scales == {"down": 0.5, "mid": 0.0, "up": 2.0}


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_diffusers_cross_attention_scale_applies_to_one_call_and_keeps_the_weights(scale):
    unet = unet_with("cat", "dog")
    unet.set_adapters(["cat", "dog"], [0.7, 0.3])
    weighted = denoise(unet)
    scaled = denoise(unet, cross_attention_kwargs={"scale": scale})
    assert torch.equal(denoise(unet), weighted)
    unet.set_adapters(["cat", "dog"], [0.7 * scale, 0.3 * scale])
    torch.testing.assert_close(scaled, denoise(unet), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lora_scale", [1.0, 0.5])
def test_diffusers_fuse_and_unfuse_restore_the_base_bytes(variant, lora_scale):
    before = all_bytes(tiny_unet())
    unet = unet_with("cat", "dog", variant=variant)
    live = denoise(unet)
    expected = denoise(unet, cross_attention_kwargs={"scale": lora_scale})
    unet.fuse_lora(lora_scale=lora_scale)
    torch.testing.assert_close(denoise(unet), expected, atol=1e-5, rtol=1e-4)
    assert all_bytes(unet) != before
    unet.unfuse_lora()
    assert all_bytes(unet) == before
    assert torch.equal(denoise(unet), live)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_an_adapter_injected_by_peft_takes_a_state_dict(variant):
    unet = unet_with("cat", variant=variant)
    state = get_peft_model_state_dict(unet, adapter_name="cat")
    assert {key.rsplit(".", 1)[1] for key in state} == {"sbora_factor", "sbora_indices"}
    other = tiny_unet()
    inject_adapter_in_model(unet_config(2, variant), other, "dog")
    result = set_peft_model_state_dict(other, state, adapter_name="dog")
    assert not result.unexpected_keys
    assert torch.equal(denoise(other), denoise(unet))


def test_diffusers_fuse_in_either_order_gives_the_same_bytes():
    a, b = unet_with("cat", "dog"), unet_with("cat", "dog")
    a.fuse_lora(adapter_names=["cat", "dog"])
    b.fuse_lora(adapter_names=["dog"])
    b.fuse_lora(adapter_names=["cat"])
    assert all_bytes(a) == all_bytes(b)


def test_diffusers_delete_adapters_even_while_fused():
    before = all_bytes(tiny_unet())
    unet = unet_with("cat", "dog")
    unet.fuse_lora()
    unet.delete_adapters("cat")
    alone = unet_with("cat", "dog")
    alone.fuse_lora(adapter_names=["dog"])
    assert all_bytes(unet) == all_bytes(alone)
    unet.delete_adapters(["dog"])
    assert all_bytes(unet) == before


def test_diffusers_disable_enable_and_unload():
    plain = denoise(tiny_unet())
    unet = unet_with("cat")
    live = denoise(unet)
    unet.disable_lora()
    assert torch.equal(denoise(unet), plain)
    unet.enable_lora()
    assert torch.equal(denoise(unet), live)
    unet.unload_lora()
    assert torch.equal(denoise(unet), plain)
    assert not any(isinstance(m, SboraLinear) for m in unet.modules())


def test_diffusers_an_sbora_adapter_works_beside_a_lora():
    unet = tiny_unet()
    plain = denoise(unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    styled = denoise(unet)
    unet.add_adapter(unet_config(), "concept")
    randomize(unet)
    unet.set_adapters(["style", "concept"], [1.0, 0.0])
    torch.testing.assert_close(denoise(unet), styled)
    unet.set_adapters(["style", "concept"], [1.0, 1.0])
    assert not torch.allclose(denoise(unet), styled)
    unet.set_adapters(["style", "concept"], [0.0, 0.0])
    torch.testing.assert_close(denoise(unet), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_gradient_checkpointing_gives_the_same_gradients(variant):
    def found(checkpointing: bool) -> list[Tensor]:
        unet = unet_with("cat", variant=variant, dropout=0.3).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return gradients(unet)

    plain, replayed = found(False), found(True)
    assert all(g.abs().sum() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def gradients(unet: nn.Module) -> list[Tensor]:
    """Of the factors, after one pass; whole where the model is divided."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 48, generator=generator)
    unet(sample, torch.tensor([10]), text).sample.square().sum().backward()
    of_factors = [p.grad for n, p in unet.named_parameters() if ".sbora_factor." in n]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in of_factors]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Iterator[None]:
    """A group of this process alone; two divide a model in tests/core/llm/test_processes.py."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def trainable(variant: str) -> nn.Module:
    unet = unet_with("cat", variant=variant)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".sbora_factor." in name)
    return unet


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_distributed_data_parallel_gives_the_same_gradients(one_process, variant):
    expected = gradients(trainable(variant))
    found = gradients(DistributedDataParallel(trainable(variant)))
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) == 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_fully_sharded_models_give_the_same_gradients(one_process, variant):
    expected, unet = gradients(trainable(variant)), trainable(variant)
    mesh = init_device_mesh("cpu", (1,))
    for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(part, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in unet.parameters())
    for found, own in zip(gradients(unet), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6 * own.abs().max())


def test_diffusers_hot_swapping_is_for_lora_alone_and_takes_the_adapter_with_it():
    """`load_sbora(…).swap` is the way; see tests/diffusion/test_loading.py."""
    styled = tiny_unet()
    styled.add_adapter(LoraConfig(r=4, target_modules=ATTENTION), "cat")
    lora = get_peft_model_state_dict(styled, adapter_name="cat")
    unet = unet_with("cat")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: SBORA and LORA"):
        unet.load_lora_adapter(lora, prefix=None, adapter_name="cat", hotswap=True)
    assert unet.peft_config == {}
