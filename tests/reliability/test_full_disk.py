"""A disk that is full after so many bytes: what was there stays, and nothing else is left."""

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sbora_diffusion.core.concept import sealed, write_concept
from sbora_diffusion.core.concept_set import write_concept_set
from sbora_diffusion.core.errors import ResourceError
from sbora_diffusion.diffusion.formats import write_lora
from sbora_diffusion.diffusion.merging import Merged
from tests.core.concept_examples import make_concept

PAIR = [(sealed(make_concept()), 1.0), (sealed(make_concept("fox", slot=1)), 0.5)]
CUTS = 50
WRITERS: dict[str, Callable[[Path], object]] = {
    "concept": lambda path: write_concept(path, PAIR[0][0]),
    "set": lambda path: write_concept_set(path, PAIR),
    "lora": lambda path: write_lora(path, PAIR),
}


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def modes(place: Path) -> set[int]:
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return {stat.S_IMODE(path.stat().st_mode) for path in files}


def cut_points(place: Path, count: int) -> list[int]:
    """From nothing to one byte too few of the largest file."""
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    largest = max(path.stat().st_size for path in files)
    return [k * (largest - 1) // (count - 1) for k in range(count)]


def refused_at(write: Callable[[Path], object], place: Path, cuts: list[int]) -> int:
    before = content(place.parent)
    for cut in cuts:
        with full_after(cut), pytest.raises(ResourceError, match="cannot be written"):
            write(place)
        assert content(place.parent) == before
        assert {p.name for p in place.parent.iterdir()} <= {place.name, "older"}
    return len(cuts)


@pytest.mark.parametrize("form", WRITERS)
def test_fifty_cut_points_leave_what_was_there(tmp_path, form, record_property):
    write, place = WRITERS[form], tmp_path / "out.safetensors"
    write(tmp_path / "whole")
    cuts = cut_points(tmp_path / "whole", CUTS)
    (tmp_path / "work").mkdir()
    place = tmp_path / "work" / "out.safetensors"
    (place.parent / "older").write_bytes(b"older")
    if form != "lora":
        place.write_bytes(b"an older file")
    record_property(f"4 cut points, {form}", refused_at(write, place, cuts))


@pytest.mark.parametrize("count", [3, pytest.param(CUTS, marks=pytest.mark.reliability)])
def test_a_model_folder_appears_whole_or_not_at_all(pocket, tmp_path, count, record_property):
    model = Merged(pocket)
    model.save(tmp_path / "whole")
    cuts = cut_points(tmp_path / "whole", count)
    (tmp_path / "work").mkdir()
    record_property(
        "4 cut points, model folder", refused_at(model.save, tmp_path / "work" / "model", cuts)
    )


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(pocket, tmp_path, mask, mode, record_property):
    """The safetensors library leaves 0600."""
    writers = {**WRITERS, "model": Merged(pocket).save}
    with umask(mask):
        for form, write in writers.items():
            write(tmp_path / form)
    assert {form: modes(tmp_path / form) for form in writers} == {form: {mode} for form in writers}
    folder = stat.S_IMODE((tmp_path / "model").stat().st_mode)
    assert folder == 0o777 & ~mask
    record_property("4 umasks and forms", len(writers))
