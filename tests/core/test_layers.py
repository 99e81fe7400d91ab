import pytest

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.layers import OTHER, kind, narrowest, role

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("layer", "of_kind", "with_role"),
    [
        (f"{UNET}.attn1.to_q", "self-attention", "self-attention q"),
        (f"{UNET}.attn2.to_k", "cross-attention", "cross-attention k"),
        (f"{UNET}.attn2.to_out.0", "cross-attention", "cross-attention out"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.v_proj",) + ("text encoder",) * 2,
        ("text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj",) + ("text encoder",) * 2,
        ("unet.conv_in", OTHER, OTHER),
        ("unet.mid_block.attn10.to_q", OTHER, f"{OTHER} q"),
    ],
)
def test_names_tell_the_kind_and_the_projection(layer, of_kind, with_role):
    if of_kind == "text encoder":
        with_role = "text encoder v" if "v_proj" in layer else "text encoder out"
    assert (kind(layer), role(layer)) == (of_kind, with_role)


def test_the_narrowest_layer_is_the_first_by_name_of_several():
    assert narrowest({"b": 4, "c": 3, "a": 3, "d": 9}) == "a"
    with pytest.raises(ConfigError, match="no layer"):
        narrowest({})
