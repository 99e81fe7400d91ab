"""Alignment and retrieval from features: pure functions of tensors.

All of them compare by the cosine, so features need not have unit length. Published protocols scale
or prefix these figures: see `protocols.py`.
"""

import torch.nn.functional as F
from torch import Tensor


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each picture with its own text, (N, D) and (N, D) → (N,).

    The quantity below CLIPScore (arXiv 2104.08718, equation 1), neither scaled nor cut off at 0.
    """
    assert images.shape == texts.shape, (images.shape, texts.shape)
    return F.cosine_similarity(images, texts, dim=-1)


def image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each picture with all references, (N, D) and (M, D) → (N,).

    CLIP-I over all pairs, as in DreamBooth (arXiv 2208.12242, section 4.1).
    """
    assert len(references), "there must be references"
    return similarity(images, references).mean(1)


def first_reference_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Cosine of each picture with the first reference alone, at least 0, (N, D), (M, D) → (N,).

    What the image alignment script of Mix-of-Show prints: it computes all pairs, one reference
    after the other, and then `zip`s them with the N names of the pictures, which keeps the first N.
    Which file comes first is left to the file system there.
    """
    assert len(references), "there must be references"
    return similarity(images, references[:1])[:, 0].clamp(min=0)


def recall_at_1(images: Tensor, texts: Tensor) -> float:
    """Share of pictures that are nearer to their own text than to every other, (N, D) and (N, D).

    A tie counts as a miss, so features that say nothing reach 0 and not 1.
    """
    assert len(images) and images.shape == texts.shape, (images.shape, texts.shape)
    cosines = similarity(images, texts)
    own = cosines.diagonal().clone()
    cosines.fill_diagonal_(-2)  # below every cosine
    return (own > cosines.max(1).values).float().mean().item()


def classify(images: Tensor, texts: Tensor) -> Tensor:
    """Index of the nearest text of each picture, (N, D) and (K, D) → (N,) int64."""
    assert len(texts), "there must be texts to choose from"
    return similarity(images, texts).argmax(1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """All cosines, (N, D) and (M, D) → (N, M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
