"""A base of random weights that trains in a moment, and two subjects for it."""

import gc

import pytest

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject, read_subject
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot
from tests.diffusion.thin_pocket import thin_pocket

NAMES = ("toytrain", "baseballcap")  # not in the order of their tokens


@pytest.fixture(scope="module")
def thin(pocket) -> Base:
    return thin_pocket(pocket)


@pytest.fixture(autouse=True)
def untouched(thin, monkeypatch):
    """Every test leaves the base as it found it."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # Accelerate's, most of a short training
    before = snapshot(thin)
    yield
    assert not thin.folded
    assert_untouched(thin, before)
    for model in (thin.pipeline.unet, thin.pipeline.text_encoder):
        hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked


@pytest.fixture(scope="session")
def subjects() -> list[Subject]:
    return [read_subject(CONCEPTS / name) for name in NAMES]
