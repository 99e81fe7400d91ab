"""Compiled models: one compilation serves all concepts and prompts of one shape."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from sbora_diffusion.core import mixed_weights
from sbora_diffusion.diffusion import runtime
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.runtime import Runtime, compile_in_place
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.helpers import CONCEPTS, assert_untouched, snapshot, strong_concept
from tests.diffusion.thin_pocket import thin_pocket

NAMES = ("plushbear", "baseballcap")
SMALL = {"steps": 2, "guidance": 3.0, "negative_prompt": "", "size": (32, 32)}


@pytest.fixture(scope="module")
def thin(pocket):
    return thin_pocket(pocket, depth=1)


@pytest.fixture
def compiled(thin, monkeypatch):
    """Compiles the thin base's models, and counts how often."""
    torch._dynamo.reset()
    counters.clear()
    before = snapshot(thin)
    models = thin.pipeline.unet, thin.pipeline.text_encoder

    def begin() -> list[CompileCounterWithBackend]:
        backends = [CompileCounterWithBackend("aot_eager") for _ in models]
        for model, backend in zip(models, backends, strict=True):
            monkeypatch.setattr(model, "compile", lambda m=model, b=backend: _through(m, b))
            compile_in_place(model)
        thin.runtime = Runtime(compiled=True)
        return backends

    yield begin
    for model in models:
        model._compiled_call_impl = None
    thin.runtime = Runtime()
    torch._dynamo.reset()
    assert_untouched(thin, before)
    assert not counters["graph_break"], "something was left to Python"


def _through(model, backend):
    model._compiled_call_impl = torch.compile(model._call_impl, backend=backend)


def compilations(backends) -> list[int]:
    return [backend.frame_count for backend in backends]


def single(base, k, **settings):
    training = ConceptTraining(base, read_subject(CONCEPTS / NAMES[k]), recipe(settings), 8 * k)
    return losses(training)


def group(base, k, **settings):
    names = [("plushbear", "baseballcap"), ("toytrain", "siamese")][k]
    subjects = [read_subject(CONCEPTS / name) for name in names]
    starts = [(0, 8), (16, 0)][k]
    lessons = [
        Lesson(base, subject, recipe(settings), start)
        for subject, start in zip(subjects, starts, strict=True)
    ]
    return losses(GroupTraining(base, lessons))


def recipe(settings) -> TrainConfig:
    quick = {"steps": 2, "batch_size": 1, "copies": 1, "resolution": 32, "warmup_steps": 0}
    return TrainConfig(**quick | {"preservation": 0.0} | settings)


def losses(training):
    try:
        return [record.losses for record in training.steps()]
    finally:
        training.close()


@pytest.mark.parametrize(
    ("learn", "settings"),
    [(single, {}), (single, {"variant": "fb"}), (group, {}), (group, {"variant": "fb"})],
    ids=["fa", "fb", "group fa", "group fb"],
)
def test_one_compilation_trains_other_concepts_with_other_indices(thin, compiled, learn, settings):
    expected = [learn(thin, k, **settings) for k in (0, 1)]
    backends = compiled()
    found = [learn(thin, k, **settings) for k in (0, 1)]
    assert compilations(backends) == [1, 1]
    for got, wanted in zip(found, expected, strict=True):
        assert got == [pytest.approx(own, rel=1e-4) for own in wanted]


@pytest.fixture(scope="module")
def concepts(thin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    return [strong_concept(thin, folder, n, slot=k) for k, n in enumerate(("one", "two"))]


def folded(base, concepts):
    """Latents of each concept, folded one after the other."""
    merged = Merged(base, [])
    try:
        for concept in concepts:
            merged.switch([(concept, 1.0)])
            prompts = [f"a <{concept.meta.name}>", f"two of <{concept.meta.name}> on grass"]
            yield draw_latents(base, prompts, [0, 1], **SMALL)
    finally:
        merged.restore()


def mixed(base, concepts):
    """Latents of batches in which concepts meet."""
    one, two = concepts
    chosen = {"a <one>": [(one, 1.0)], "a <two>": [(two, 0.7)]}
    for prompts in (["a <one>", "a <two>"], ["a <two>", "a <one>"]):
        yield MixedSampler(lambda prompt: chosen[prompt])(base, prompts, [0, 1], **SMALL)


@pytest.mark.parametrize(
    ("drawn", "tokens"),
    [(folded, 64), (mixed, 1), (mixed, 1 << 20)],
    ids=["folded", "mixed, folded", "mixed, two paths"],
)
def test_one_compilation_draws_other_concepts_and_prompts(
    thin, compiled, concepts, drawn, tokens, monkeypatch
):
    monkeypatch.setattr(mixed_weights, "FOLD_FROM", tokens)
    expected = list(drawn(thin, concepts))
    backends = compiled()
    found = list(drawn(thin, concepts))
    assert compilations(backends) == [1, 1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_hooks_that_come_after_the_compilation_are_called(thin, compiled, concepts):
    compiled()
    plain = draw_latents(thin, ["a toy"] * 2, [0, 1], **SMALL)
    one, two = mixed(thin, concepts)
    assert not torch.equal(one, two) and not torch.equal(one, plain)


def test_a_base_is_compiled_when_it_is_loaded_and_only_if_that_was_asked_for(monkeypatch):
    from sbora_diffusion.diffusion import bases

    found = []
    monkeypatch.setattr(bases, "compile_in_place", found.append)
    assert not bases.load_base("pocket", "cpu").runtime.compiled and not found
    base = bases.load_base("pocket", "cpu", "fp32", runtime.Runtime(graphs=False, compiled=True))
    assert found == [base.pipeline.unet, base.pipeline.text_encoder]
    assert base.runtime == Runtime(graphs=False, compiled=True)
