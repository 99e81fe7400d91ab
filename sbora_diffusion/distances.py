"""How far the pictures in one folder are from those in another, as the judges see them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.alignment import Judges
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.evaluate import image_files_of
from sbora_diffusion.evaluation.features import BATCH_SIZE, ImageFeatures, batches_of
from sbora_diffusion.evaluation.kid import check_comparable, kernel_distance


def folder_distances(
    judges: Judges,
    folder: Path,
    real: Path,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Name of the features → kernel distance (KID) between two folders, ready for JSON.

    Args:
        on_step: called with (pictures judged, pictures in all).

    Raises:
        ConfigError: torchmetrics is not installed.
        DataError: a folder has fewer than two pictures, or one cannot be read.
    """
    extractors = (judges.clip, *judges.further)
    drawn, known = image_files_of(folder), image_files_of(real)
    check_comparable(len(drawn), len(known))
    features = _features(extractors, [*drawn, *known], on_step)
    return {
        judge.name: asdict(kernel_distance(found[: len(drawn)], found[len(drawn) :], seed))
        for judge, found in zip(extractors, features, strict=True)
    }


def _features(
    extractors: Sequence[ImageFeatures],
    files: Sequence[Path],
    on_step: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """(N, D) of each extractor, a few files at a time."""
    parts: list[list[Tensor]] = [[] for _ in extractors]
    done = 0
    for some in batches_of(files, BATCH_SIZE):
        pictures = [open_image(file) for file in some]
        for part, extractor in zip(parts, extractors, strict=True):
            part.append(extractor.images(pictures))
        done += len(some)
        if on_step:
            on_step(done, len(files))
    return [torch.cat(part) for part in parts]
