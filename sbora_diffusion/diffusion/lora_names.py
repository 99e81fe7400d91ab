"""The names that other tools have for a layer, from its canonical name and back.

kohya's trainer joins a module's path by underscores behind a prefix for the model it is in. For
SDXL that path is the one of Stability's own code, with numbered input and output blocks, for SD 1
and 2 it is diffusers' (`networks/lora.py` and `library/sdxl_model_util.py` of kohya-ss/sd-scripts).
ComfyUI and A1111 know both.
"""

import re

from sbora_diffusion.core.errors import ConfigError

SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
}
"""What follows a layer's name in a LoRA file, to what it stands for."""

_ONE_ENCODER = {"unet": "lora_unet", "text_encoder": "lora_te"}
_TWO_ENCODERS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_PREFIXES = {
    "pocket": _ONE_ENCODER,
    "sd1": _ONE_ENCODER,
    "sd2": _ONE_ENCODER,
    "sdxl": _TWO_ENCODERS,
}
"""Family to component to kohya's prefix."""

_COMPONENTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
# Parts of a module's path that have underscores of their own.
_WORDS = re.compile(
    r"((?:down|up|mid|input|middle|output|transformer)_blocks?|to_[qkv]|to_out|text_model"
    r"|self_attn|[qkv]_proj|out_proj|proj_in|proj_out)(?:_|$)"
)
_ATTENTION = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")
_NUMBERED = re.compile(r"(input|output)_blocks\.(\d+)\.1\.")
_FLATTENED = re.compile(r"^(text_encoder(?:_2)?)\.(?=encoder\.)")


def kohya_name(layer: str, family: str) -> str:
    """E.g. `lora_te_text_model_encoder_layers_0_self_attn_q_proj`.

    Raises:
        ConfigError: kohya's format has no name for a layer of this family.
    """
    component, _, path = layer.partition(".")
    prefix = KOHYA_PREFIXES.get(family, {}).get(component)
    if prefix is None:
        raise ConfigError(
            f"kohya's format has no names for {component!r} of family {family!r}",
            "export with --to diffusers",
        )
    if family == "sdxl":
        path = numbered_blocks(path)
    return f"{prefix}_{path.replace('.', '_')}"


def numbered_blocks(path: str) -> str:
    """diffusers' path of an attention layer of a UNet → that of Stability's code: three blocks a
    resolution on the way down behind the first convolution, three on the way up."""
    if path.startswith("mid_block.attentions.0."):
        return path.replace("mid_block.attentions.0.", "middle_block.1.")
    return _ATTENTION.sub(_number, path)


def canonical_name(name: str) -> str:
    """A layer's canonical name from kohya's, diffusers' or an older canonical one.

    What is no attention layer may get a name that no model has.
    """
    prefix = re.match(r"lora_(?:unet|te[12]?)(?=_)", name)
    if prefix:
        path = name[prefix.end() + 1 :]
        name = f"{_COMPONENTS[prefix[0]]}.{_dotted(path)}"
    name = _NUMBERED.sub(_unnumber, name).replace(".middle_block.1.", ".mid_block.attentions.0.")
    return _FLATTENED.sub(r"\1.text_model.", name)


def _dotted(path: str) -> str:
    parts = _WORDS.split(path)  # between the words, parts that are joined by underscores
    plain = [part.strip("_").replace("_", ".") for part in parts[::2]]
    words = [*parts[1::2], ""]
    return ".".join(p for pair in zip(plain, words, strict=True) for p in pair if p)


def _number(match: re.Match[str]) -> str:
    way, block, attention = match[1], int(match[2]), int(match[3])
    if way == "down":
        return f"input_blocks.{1 + 3 * block + attention}.1."
    return f"output_blocks.{3 * block + attention}.1."


def _unnumber(match: re.Match[str]) -> str:
    number = int(match[2]) - (match[1] == "input")
    way = "down" if match[1] == "input" else "up"
    return f"{way}_blocks.{number // 3}.attentions.{number % 3}."
