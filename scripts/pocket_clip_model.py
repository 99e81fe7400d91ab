"""pocket-clip, the judge of the embedded world: its configuration, tokens and folder.

A model of open_clip with an own configuration: a convolutional image tower of timm and a small
text transformer over the pocket tokenizer's BPE. The folder is what `open_clip.create_model`
reads as `local-dir:FOLDER`; its tokenizer is `get_tokenizer("local-dir:FOLDER", bpe_path=…)`.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip import ClipLoss
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

SIZE_BUDGET = 8 * 2**20  # bytes of the whole folder
CONTEXT_LENGTH = 48
BPE_FILE = "bpe.txt.gz"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


def model_config(vocabulary: int) -> dict:
    """open_clip's `model_cfg`: 2.8M parameters see, 1.35M read (at a vocabulary of 4,096)."""
    return {
        "embed_dim": 224,
        "vision_cfg": {
            "image_size": 128,
            "timm_model_name": "ese_vovnet19b_slim",  # arXiv 1911.06667, dense convolutions
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 4,
            "tokenizer_kwargs": {"bpe_path": BPE_FILE},
        },
    }


def preprocess_config() -> dict:
    """open_clip's `preprocess_cfg`: pixels in [−1, 1], as the composer gives them."""
    return {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def build_clip(tokenizer: CLIPTokenizer) -> CLIP:
    """The untrained model, with the configuration that is written beside its weights."""
    return CLIP(**model_config(len(tokenizer)))


def bpe_text(tokenizer: CLIPTokenizer) -> str:
    """The merges as the text that open_clip's `SimpleTokenizer` reads: a header, a pair a line.

    There the vocabulary is 256 byte letters, the same as word ends, the merges, start and end;
    the tokenizer must have that order, so that ids agree.
    """
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(tokenizer) == 2 * 256 + len(merges) + 2, "not in CLIP's order of ids"
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])


def caption_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids (B, 48) as open_clip's tokenizer gives them: truncated, padded with 0."""
    encoded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=CONTEXT_LENGTH,
        return_tensors="pt",
    )  # fmt: skip
    return (encoded.input_ids * encoded.attention_mask).short()


def contrastive_loss(rank: int, world: int) -> ClipLoss:
    """Symmetric InfoNCE (arXiv 2103.00020) with the negatives of all devices."""
    return ClipLoss(
        local_loss=world > 1, gather_with_grad=world > 1, rank=rank, world_size=world,
        cache_labels=True,
    )  # fmt: skip


def load_clip(folder: Path, device: torch.device) -> CLIP:
    """The model of a folder that `save_clip` wrote, in full precision, for judging."""
    return open_clip.create_model(f"local-dir:{folder}", device=device).eval()


def save_clip(folder: Path, model: CLIP, tokenizer: CLIPTokenizer) -> None:
    """Write weights in half precision (counters stay whole numbers), configuration and BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": preprocess_config()}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    (folder / BPE_FILE).write_bytes(gzip.compress(bpe_text(tokenizer).encode(), mtime=0))
