"""The names in kohya's files, against lists made from the rules alone, in the shapes of SD 1.5 and
SDXL."""

from itertools import product

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.lora import LoraLayer
from sbora_diffusion.diffusion.lora_files import kohya_tensors
from sbora_diffusion.diffusion.lora_names import canonical_name, kohya_name
from sbora_diffusion.diffusion.targets import name_prefix
from sbora_diffusion.diffusion.untrained import sd15_unet, sdxl_unet

ENDS = ("lora_down.weight", "lora_up.weight", "alpha")
UNET_LINEARS = [f"attn{n}_to_{x}" for n, x in product((1, 2), ("q", "k", "v", "out_0"))]
TEXT_LINEARS = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")]


def texts(prefix: str, layers: int) -> list[str]:
    return [
        f"{prefix}_text_model_encoder_layers_{n}_{linear}"
        for n, linear in product(range(layers), TEXT_LINEARS)
    ]


def blocks(place: str, transformers: int) -> list[str]:
    return [
        f"lora_unet_{place}_transformer_blocks_{n}_{linear}"
        for n, linear in product(range(transformers), UNET_LINEARS)
    ]


def sd15_golden() -> set[str]:
    """diffusers' names: two attentions in each of the first three blocks down, three in each of the
    last three up, one in the middle; a text encoder of twelve layers."""
    places = [f"down_blocks_{i}_attentions_{j}" for i, j in product((0, 1, 2), (0, 1))]
    places += [f"up_blocks_{i}_attentions_{j}" for i, j in product((1, 2, 3), (0, 1, 2))]
    places += ["mid_block_attentions_0"]
    names = [name for place in places for name in blocks(place, 1)]
    return {f"{name}.{end}" for name in names + texts("lora_te", 12) for end in ENDS}


def sdxl_golden() -> set[str]:
    """Stability's names: attention in input blocks 4, 5 (two transformer blocks each) and 7, 8 (ten
    each), the middle (ten), output blocks 0 to 2 (ten each) and 3 to 5 (two each); text encoders of
    12 and 32 layers."""
    deep = {f"input_blocks_{n}_1": 10 for n in (7, 8)} | {"middle_block_1": 10}
    deep |= {f"output_blocks_{n}_1": 10 for n in (0, 1, 2)}
    flat = {f"input_blocks_{n}_1": 2 for n in (4, 5)}
    flat |= {f"output_blocks_{n}_1": 2 for n in (3, 4, 5)}
    names = [name for place, count in (deep | flat).items() for name in blocks(place, count)]
    names += texts("lora_te1", 12) + texts("lora_te2", 32)
    return {f"{name}.{end}" for name in names for end in ENDS}


def text_encoder(kind, width: int, layers: int):
    return kind(
        CLIPTextConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
    )


def models(family: str) -> dict[str, torch.nn.Module]:
    first = text_encoder(CLIPTextModel, 768, 12)
    if family == "sd1":
        return {"unet": sd15_unet(), "text_encoder": first}
    second = text_encoder(CLIPTextModelWithProjection, 1280, 32)
    return {"unet": sdxl_unet(), "text_encoder": first, "text_encoder_2": second}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def layers(request) -> tuple[str, dict[str, torch.nn.Linear]]:
    """Family; canonical name → attention layer, on the meta device."""
    with torch.device("meta"):
        found = models(request.param)
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    return request.param, {
        name_prefix(component, model) + path: module
        for component, model in found.items()
        for path, module in model.named_modules()
        if path.endswith(ends) and "attn" in path
    }


def test_the_keys_are_those_that_the_rules_give_and_no_others(layers):
    family, linears = layers
    rank = 4
    loras = {
        name: LoraLayer(
            torch.empty(rank, linear.in_features, device="meta"),
            torch.empty(linear.out_features, rank, device="meta"),
            0.5,
        )
        for name, linear in linears.items()
    }
    tensors = kohya_tensors(loras, family)
    golden = {"sd1": sd15_golden, "sdxl": sdxl_golden}[family]()
    assert len(golden) == 3 * {"sd1": 176, "sdxl": 736}[family]
    assert tensors.keys() == golden
    alphas = [value for key, value in tensors.items() if key.endswith(".alpha")]
    assert all(value.shape == () and value.item() == 2.0 for value in alphas)


def test_every_name_leads_back_to_its_layer(layers):
    family, linears = layers
    for name in linears:
        assert canonical_name(kohya_name(name, family)) == name
        assert canonical_name(name) == name
        if not name.startswith("text_encoder_2"):
            assert canonical_name(kohya_name(name, "sd1")) == name


def test_names_without_text_model_are_the_flattened_encoders():
    bare = "text_encoder.encoder.layers.3.self_attn.q_proj"
    assert canonical_name(bare) == "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", "sd3"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unknown"),
    ],
)
def test_families_that_kohya_has_no_names_for_are_refused(layer, family):
    with pytest.raises(ConfigError, match="--to diffusers"):
        kohya_name(layer, family)
