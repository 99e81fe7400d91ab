"""Concepts in other tools' files: one LoRA and the embeddings of its tokens, for diffusers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sbora_diffusion.core.compatibility import check_mergeable
from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.core.folded_set import Weighted, concept_updates
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.functional import one_hot, scaled_factor
from sbora_diffusion.core.storage import canonical_json, encode, write_atomically
from sbora_diffusion.core.updates import Update
from sbora_diffusion.diffusion.merging import RECORD, merge_record
from sbora_diffusion.diffusion.pipeline import token_vectors

LORA_FILE = "pytorch_lora_weights.safetensors"


def write_lora(
    folder: Path,
    concepts: Sequence[Weighted],
    allow_overlap: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write a folder with one LoRA of all concepts and an embeddings file for each token.

    `pipeline.load_lora_weights(folder)` and `pipeline.load_textual_inversion(files)` of stock
    diffusers load them. The bytes do not depend on the order of `concepts`.

    Returns:
        The files with the embeddings.

    Raises:
        BaseMismatch, ConflictError: the concepts cannot live in one model, or the folder exists and
            is not empty.
        FormatError: see `refuse_extras`.
        NonFiniteError: a number does not fit into `dtype`.
        ResourceError: the folder cannot be written.
    """
    check_mergeable([concept for concept, _ in concepts], allow_overlap)
    record = merge_record(concepts, allow_overlap, dtype)
    lora = _rounded(lora_tensors(concepts), dtype)
    tokens = {
        token: rows for concept, _ in concepts for token, rows in token_vectors(concept).items()
    }
    tokens = _rounded(tokens, dtype)

    def fill(unfinished: Path) -> None:
        metadata = {"format": "pt", "sbora": canonical_json(record)}
        write_atomically(unfinished / LORA_FILE, encode(lora, metadata))
        for token, rows in tokens.items():
            data = encode({token: rows}, {"format": "pt"})
            write_atomically(unfinished / _embeddings_file(token), data)
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return [folder / _embeddings_file(token) for token in sorted(tokens)]


def lora_tensors(concepts: Sequence[Weighted]) -> dict[str, Tensor]:
    """One LoRA with ΔW = B A = Σ λ·scale·ΔW_i, in fp32, in PEFT's layout.

    The ranks stand side by side in the order of the digests: FA gives one-hot rows of A and
    λ·scale·B, FB λ·scale·A and one-hot columns of B. There is no alpha, so readers scale by 1.

    Returns:
        ``<layer>.lora_A.weight`` (R, in) and ``<layer>.lora_B.weight`` (out, R) of each layer,
        under its canonical name, R being the sum of the ranks.
    """
    ordered = sorted(concepts, key=lambda pair: pair[0].meta.digest)
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for concept, weight in ordered:
        for layer, update in concept_updates(concept, weight).items():
            width = concept.meta.widths[layer]
            by_layer.setdefault(layer, []).append(_down_and_up(update, width))
    tensors = {}
    for layer, pairs in by_layer.items():
        tensors[f"{layer}.lora_A.weight"] = torch.cat([down for down, _ in pairs], 0)
        tensors[f"{layer}.lora_B.weight"] = torch.cat([up for _, up in pairs], 1)
    return tensors


def _down_and_up(update: Update, width: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one update, with its scale in the trained factor."""
    fixed = one_hot(update.indices, width).float()  # (r, width)
    trained = scaled_factor(update.factor, update.scale).float()
    return (fixed, trained) if update.variant == "fa" else (trained, fixed.T)


def _rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    rounded = {name: values.to(dtype) for name, values in tensors.items()}
    for name, values in rounded.items():
        if not values.isfinite().all():
            raise NonFiniteError(
                f"{name} does not fit into {dtype}", "lower the weights or use fp32"
            )
    return rounded


def _embeddings_file(token: str) -> str:
    # The prefix keeps a token from taking the name of another file of the folder.
    return f"token_{token.strip('<>')}.safetensors"
