"""Models that wait in the CPU's memory: the same results, and each where it should be."""

import pytest
import torch
from torch import nn

from sbora_diffusion.core.errors import ConflictError
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.offloading import Offloading
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw
from sbora_diffusion.diffusion.runtime import Runtime
from sbora_diffusion.diffusion.tokens import PlaceholderTokens
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.conftest import CONCEPTS
from tests.diffusion.test_families import assert_untouched, parts
from tests.diffusion.thin_families import NAMES, thin_family

TINY = TrainConfig(
    steps=2, copies=1, batch_size=1, preservation=1.0, rank=4, vectors=2, rate_unet=0.1,
    rate_text_encoder=0.1, rate_tokens=0.1, flip=False,
)  # fmt: skip
PROMPT = "a photo of <plushbear>"
GPU = torch.device("cpu", 0)
"""Stands for one: a place that accelerate tells from "cpu", on which everything can be computed."""


class Places:
    """Where a pipeline's models were told to go last."""

    def __init__(self, base: Base, monkeypatch) -> None:
        models = base.pipeline.components.items()
        self._names = {id(m): name for name, m in models if isinstance(m, nn.Module)}
        self.now: dict[str, str] = {}
        real = nn.Module.to

        def to(module, place, *args, **options):
            if id(module) in self._names:
                self.now[self._names[id(module)]] = "gpu" if place == GPU else "cpu"
            return real(module, place, *args, **options)

        monkeypatch.setattr(nn.Module, "to", to)

    def on_gpu(self) -> set[str]:
        return {name for name, place in self.now.items() if place == "gpu"}


@pytest.fixture(scope="module", params=NAMES)
def base(request, pocket) -> Base:
    return thin_family(request.param, pocket)


@pytest.fixture
def places(base, monkeypatch):
    """The base with models that wait; afterwards as before."""
    places = Places(base, monkeypatch)
    before = parts(base)
    base.offloading = Offloading(base.pipeline, GPU)
    yield places
    base.pipeline.remove_all_hooks()
    base.offloading = None
    assert_untouched(base, before)


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    monkeypatch.setattr("sbora_diffusion.diffusion.preservation.PICTURES", 2)
    monkeypatch.setattr("sbora_diffusion.diffusion.preservation.NOISED", 1)
    monkeypatch.setattr("sbora_diffusion.diffusion.preservation.STEPS", 1)


def opened(base: Base, config: TrainConfig = TINY) -> ConceptTraining:
    return ConceptTraining(base, read_subject(CONCEPTS / "plushbear"), config, 0)


def pictures(base: Base) -> list[bytes]:
    return [p.tobytes() for p in draw(base, [PROMPT] * 2, [0, 1], steps=2)]


def trained(base: Base):
    """The concept, and what was drawn between the steps and afterwards."""
    training = opened(base)
    try:
        steps = training.steps()
        next(steps)
        between = pictures(base)
        list(steps)
        concept = training.concept()
    finally:
        training.close()
    live = ConceptPipeline(base)
    live.add(concept)
    try:
        return concept.meta.digest, between, pictures(base)
    finally:
        live.remove("plushbear")


@pytest.fixture(scope="module")
def usual(base):
    """What a base gives whose models all stay."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PICTURES", 2), ("NOISED", 1), ("STEPS", 1)):
            patch.setattr(f"sbora_diffusion.diffusion.preservation.{name}", value)
        return trained(base)


def test_concepts_and_pictures_are_the_same(base, usual, places):
    assert trained(base) == usual
    assert base.device == GPU and not places.on_gpu()


def test_what_is_not_trained_leaves_before_the_first_step(base, places):
    encoders = {e.model for e in base.kind.present(base.pipeline) if e.trained}
    cases = (({}, encoders), ({"rate_tokens": 0.0, "rate_text_encoder": 0.0}, set()))
    for settings, trained_encoders in cases:
        training = opened(base, TINY.model_copy(update=settings))
        try:
            next(training.steps())
            assert places.on_gpu() == {base.kind.denoiser, *trained_encoders}
            pictures(base)
            assert places.on_gpu() == {base.kind.denoiser, *trained_encoders}
        finally:
            training.close()
        assert not places.on_gpu()


def test_a_model_comes_when_its_turn_is_and_all_wait_afterwards(base, places):
    found = []
    hook = base.denoiser.register_forward_hook(lambda *_: found.append(places.on_gpu()))
    try:
        pictures(base)
    finally:
        hook.remove()
    # That the text encoders have left by then is accelerate's work, and needs a device of its own.
    assert found and all(base.kind.denoiser in there and "vae" not in there for there in found)
    assert not places.on_gpu()


def test_a_training_that_cannot_begin_leaves_them_waiting(base, places, monkeypatch):
    def refuse(*_):
        raise ConflictError("the token is known")

    monkeypatch.setattr(PlaceholderTokens, "add", refuse)
    with pytest.raises(ConflictError):
        opened(base)
    assert not places.on_gpu()


def test_a_base_that_is_loaded_so_draws_the_same(pocket):
    waiting = load_base("pocket", "cpu", runtime=Runtime(offloaded=True))
    assert waiting.device == torch.device("cpu") and hasattr(waiting.denoiser, "_hf_hook")
    drawn = [draw(base, ["a photo of a cat"], [0], steps=1)[0] for base in (pocket, waiting)]
    assert drawn[0].tobytes() == drawn[1].tobytes()
