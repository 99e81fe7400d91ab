"""A pipeline's weights under the names of Stability's code, as checkpoints of one file have."""

import re

import torch

INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
AUTOENCODER = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def single_file(pipeline) -> dict[str, torch.Tensor]:
    """UNet and text encoders; the autoencoder, which nothing here changes, as one odd tensor."""
    unet = pipeline.unet.state_dict()
    tensors = {f"model.diffusion_model.{unet_name(k, unet)}": v for k, v in unet.items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.arange(8.0).half()
    second = getattr(pipeline, "text_encoder_2", None)
    place = "conditioner.embedders.0" if second else "cond_stage_model"
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{place}.transformer.text_model.{key}"] = value
    if second:
        clip = open_clip(second.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{key}": v for key, v in clip.items()}
    return {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }


def whole_file(pipeline) -> dict[str, torch.Tensor]:
    """The same with the autoencoder, as it is read back."""
    tensors = single_file(pipeline)
    del tensors["first_stage_model.decoder.conv_in.weight"]
    vae = pipeline.vae.state_dict()
    for key, value in vae.items():
        square = ".attentions." in key and value.dim() == 2  # a convolution of one pixel there
        value = value[..., None, None] if square else value
        tensors[f"first_stage_model.{vae_name(key, vae)}"] = value.clone()
    return tensors


def vae_name(key: str, every) -> str:
    """Stability counts the decoder's levels from the picture's side."""
    for theirs, ours in AUTOENCODER.items():
        key = re.sub(rf"\b{re.escape(theirs)}\b", ours, key)
    levels = 1 + max(int(k.split(".")[2]) for k in every if k.startswith("decoder.up_blocks."))
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
    return key.replace(".resnets.", ".block.")


def unet_name(key: str, every) -> str:
    for theirs, ours in OUTER.items():
        if key.startswith(f"{theirs}."):
            return key.replace(theirs, ours)
    part = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", key)
    way, kind, number, rest = part[1], part[3], int(part[4]), part[5]
    block = int(part[2] or 0)
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        after = 2 if any(k.startswith(f"up_blocks.{block}.attentions") for k in every) else 1
        return f"output_blocks.{3 * block + 2}.{after}.{rest}"
    if kind == "resnets":
        name, _, last = rest.rpartition(".")
        rest = f"{INNER[name]}.{last}"
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    place = f"input_blocks.{3 * block + number + 1}"
    if way == "up":
        place = f"output_blocks.{3 * block + number}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{rest}"


def open_clip(clip) -> dict[str, torch.Tensor]:
    """transformers' names → open_clip's, with q, k and v in one tensor."""
    found = {
        "token_embedding.weight": clip["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": clip["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": clip["text_model.final_layer_norm.weight"],
        "ln_final.bias": clip["text_model.final_layer_norm.bias"],
        "text_projection": clip["text_projection.weight"].T,
    }
    count = 1 + max(int(k.split(".")[3]) for k in clip if ".layers." in k)
    for n in range(count):
        here, there = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}"
        for end in ("weight", "bias"):
            for theirs, ours in CLIP_BLOCK.items():
                found[f"{there}.{ours}.{end}"] = clip[f"{here}.{theirs}.{end}"]
            thirds = [clip[f"{here}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            found[f"{there}.attn.in_proj_{end}"] = torch.cat(thirds)
    return found
