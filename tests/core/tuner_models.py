"""What the tuner tests share: one small layer, a tiny UNet, a tiny text encoder."""

import re

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sbora_diffusion.core.tuner import SboraConfig, SboraLinear

IN, OUT, RANK = 24, 16, 4
VARIANTS = ["fa", "fb"]
HALVES = [torch.float16, torch.bfloat16]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def make(*slots: int, dtype=torch.float32, bias=True, **options) -> SboraLinear:
    """A layer with adapters "s0", "s1", ... on the given slots, all active, factors random."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias)
    for parameter in base.parameters():
        nn.init.normal_(parameter, generator=g)
    configs = {f"s{s}": SboraConfig(r=RANK, slot=s, **options) for s in slots}
    names = list(configs)
    layer = SboraLinear(base.to(dtype), names[0], configs[names[0]], "unet.layer")
    for name in names[1:]:
        layer.update_layer(name, configs[name], "unet.layer")
    layer.set_adapter(names)
    return random_factors(layer)


def random_factors(layer: SboraLinear) -> SboraLinear:
    g = torch.Generator().manual_seed(1)
    for factor in layer.sbora_factor.values():
        nn.init.normal_(factor, std=0.1, generator=g)
    return layer


def inputs(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def weight_bytes(layer: SboraLinear) -> bytes:
    return layer.get_base_layer().weight.detach().view(torch.uint8).numpy().tobytes()


def tiny_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=48,
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()


def tiny_text() -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
        return CLIPTextModel(config).eval()


def unet_config(slot: int = 0, variant: str = "fa", **options) -> SboraConfig:
    options = {"target_modules": ATTENTION, "name_prefix": "unet.", **options}
    return SboraConfig(r=4, slot=slot, variant=variant, **options)


def text_config(slot: int = 0, variant: str = "fa", **options) -> SboraConfig:
    options = {"target_modules": TEXT, "name_prefix": "text_encoder.", **options}
    return SboraConfig(r=4, slot=slot, variant=variant, **options)


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter of the model weights large enough to show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".sbora_factor." in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)


@torch.no_grad()
def denoise(unet: nn.Module, **options) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 48, generator=generator)
    return unet(sample, torch.tensor([10]), text, **options).sample


@torch.no_grad()
def encode(text: nn.Module) -> Tensor:
    return text(input_ids=torch.arange(1, 15)[None]).last_hidden_state


def all_bytes(model: nn.Module) -> dict[str, bytes]:
    """The base's parameters, by their names without adapters."""
    parameters = [(n, p) for n, p in model.named_parameters() if ".sbora_" not in n]
    return {
        re.sub(r"base_model\.model\.|\.base_layer", "", name): p.detach().numpy().tobytes()
        for name, p in parameters
    }


def unet_with(*names: str, variant: str = "fa", **options) -> UNet2DConditionModel:
    unet = tiny_unet()
    for slot, name in enumerate(names):
        unet.add_adapter(unet_config(slot, variant, **options), name)
    randomize(unet)
    unet.set_adapter(list(names))
    return unet
