"""A random CLIP model of a hundred kilobytes, in the layout of `sbora_diffusion/pocket/clip`."""

import gzip
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

MERGES = ("r e", "re d</w>", "o n</w>", "b e", "be a", "bea r</w>")
VOCABULARY = 512 + len(MERGES) + 2


def write_tiny_clip(folder: Path) -> str:
    """Write the model; gives its name for open_clip."""
    lines = "\n".join(("#version: 1", *MERGES))
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    text = {
        "context_length": 32,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
    }
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    half = [0.5] * 3
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": half, "std": half, "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.create_model(name, load_weights=False)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return name
