"""What is recorded once and replayed computes what it computes call by call."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sbora_diffusion.diffusion import graphs
from sbora_diffusion.diffusion.bases import load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.drawing import RecordedUNet, state_of
from sbora_diffusion.diffusion.graphs import Obstacle, Recorded
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.lesson import Lesson
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.mixed import MixedSampler
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.region_attention import wrapped
from sbora_diffusion.diffusion.runtime import Runtime
from sbora_diffusion.diffusion.training import ConceptTraining
from tests.diffusion.helpers import CONCEPTS, assert_untouched, fold_from, snapshot, strong_concept
from tests.diffusion.tape import Recorder
from tests.diffusion.thin_pocket import thin_pocket

CPU = torch.device("cpu")
QUICK = {
    "steps": 3, "batch_size": 1, "copies": 1, "resolution": 32, "warmup_steps": 0, "seed": 3,
    "preservation": 0.0,
}  # fmt: skip
SMALL = {"steps": 2, "guidance": 3.0, "negative_prompt": "", "size": (32, 32)}


@pytest.fixture
def recorder(monkeypatch):
    """Lets the CPU have graphs."""
    recorder = Recorder()
    monkeypatch.setattr(graphs, "CAPABLE", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "capture", recorder)
    return recorder


@contextmanager
def eager(base):
    before, base.runtime = base.runtime, Runtime(graphs=False)
    try:
        yield
    finally:
        base.runtime = before


@pytest.fixture(scope="module")
def thin(pocket):
    return thin_pocket(pocket)


@pytest.fixture
def base(thin):
    """The thin base, untouched and without recordings afterwards."""
    before = snapshot(thin)
    yield thin
    thin.recorded = RecordedUNet()
    assert_untouched(thin, before)


def test_each_shape_is_recorded_once_and_what_it_adds_to_counts_each_call_once(recorder):
    weight, total = torch.ones(2), torch.zeros(2)

    def work(x):
        total.add_(x.sum())
        return x * weight.sum()

    recorded = Recorded(work, CPU, adds_to=[total])
    results = [recorded(torch.full((n,), float(n))) for n in (2, 3, 2, 3)]
    assert [r.tolist() for r in results] == [[4, 4], [6, 6, 6]] * 2
    assert total.tolist() == [26, 26] and (recorder.recorded, recorder.played) == (2, 4)
    weight.zero_()
    assert recorded(torch.ones(2)).tolist() == [0, 0], "weights are read where they lie"


def test_a_recording_is_made_on_the_device_that_the_work_is_for(recorder, monkeypatch):
    entered = []

    @contextmanager
    def on_device(device):
        entered.append((device, recorder.recorded))
        yield

    monkeypatch.setattr(graphs, "on_device", on_device)
    Recorded(torch.square, CPU)(torch.ones(2))
    assert entered == [(CPU, 0)] and recorder.recorded == 1


def test_work_that_reads_a_value_is_called_as_it_is_and_says_why(recorder):
    total = torch.zeros(1)

    def work(x):
        total.add_(1)
        return x * x.sum().item()

    recorded = Recorded(work, CPU, adds_to=[total])
    with pytest.warns(UserWarning, match="recording failed"):
        assert recorded(torch.ones(2)).tolist() == [2, 2]
    assert recorded.obstacle is Obstacle.FAILED and total.item() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recorded(torch.ones(3)).tolist() == [3, 3, 3]


def open_single(base, **settings):
    return ConceptTraining(
        base, read_subject(CONCEPTS / "plushbear"), TrainConfig(**QUICK | settings), 0
    )


def open_group(base, **settings):
    config = TrainConfig(**QUICK | settings)
    subjects = [read_subject(CONCEPTS / name) for name in ("toytrain", "plushbear")]
    return GroupTraining(base, [Lesson(base, s, config, 8 * k) for k, s in enumerate(subjects)])


def learned(training, between=lambda training: None):
    """(losses of each step, all that was trained)."""
    try:
        losses = []
        for record in training.steps():
            losses.append(record.losses)
            between(training)
        concepts = training.concepts() if hasattr(training, "concepts") else [training.concept()]
        factors = [layer.factor.flatten() for c in concepts for layer in c.layers.values()]
        vectors = [vectors.flatten() for c in concepts for vectors in c.embeddings.values()]
        return losses, torch.cat(factors + vectors), training.obstacle
    finally:
        training.close()


def assert_learns_the_same(base, recorder, opened, recordings, between=lambda _: None, **settings):
    losses, trained, obstacle = learned(opened(base, **settings), between)
    assert obstacle is None and recorder.recorded == recordings
    with eager(base):
        expected_losses, expected, obstacle = learned(opened(base, **settings))
    assert obstacle is Obstacle.OFF and recorder.recorded == recordings
    assert losses == expected_losses and torch.equal(trained, expected) and expected.any()


@pytest.mark.parametrize(
    ("opened", "settings"),
    [
        (open_single, {}),
        (open_single, {"variant": "fb", "gradient_accumulation": 2, "steps": 2}),
        (open_group, {}),
        (open_group, {"variant": "fb", "steps": 2}),
    ],
    ids=["fa", "fb accumulated", "group fa", "group fb"],
)
def test_training_is_recorded_once_and_learns_the_same_to_the_bit(base, recorder, opened, settings):
    assert_learns_the_same(base, recorder, opened, 1, **settings)


def test_prior_pictures_of_another_size_are_a_recording_of_their_own(base, recorder, monkeypatch):
    from sbora_diffusion.diffusion import lesson, pipeline

    monkeypatch.setattr(
        lesson, "draw", lambda base, prompts, seeds: pipeline.draw(base, prompts, seeds, 1)
    )
    monkeypatch.setattr(RecordedUNet, "replaying", lambda *_: eager(base))
    settings = {"prior_weight": 0.5, "prior_images": 1, "steps": 2, "resolution": 64}
    assert_learns_the_same(base, recorder, open_single, 2, **settings)


def disable_for_a_while(training):
    for layer in training.adapted.values():
        layer.enable_adapters(False)
    for layer in training.adapted.values():
        layer.enable_adapters(True)


def test_weights_that_came_and_went_between_the_steps_are_learned_from_the_same(base, recorder):
    assert_learns_the_same(base, recorder, open_single, 1, disable_for_a_while)


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({"dropout": 0.5}, Obstacle.DROPOUT),
        ({"gradient_checkpointing": True}, Obstacle.CHECKPOINTING),
    ],
)
def test_recipes_that_cannot_be_recorded_train_without_and_say_why(
    base, recorder, settings, obstacle
):
    settings |= {"steps": 1, "targets": "text-encoder"}
    _, trained, found = learned(open_single(base, **settings))
    assert found is obstacle and recorder.recorded == 0 and trained.any()


@pytest.fixture(scope="module")
def concepts(thin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    return [strong_concept(thin, folder, n, slot=k) for k, n in enumerate(("one", "two"))]


def drawn(base, prompts, sampler=draw_latents):
    return sampler(base, prompts, list(range(len(prompts))), **SMALL)


def assert_draws_the_same(base, prompts, sampler=draw_latents):
    latents = drawn(base, prompts, sampler)
    assert base.recorded.obstacle is None
    with eager(base):
        assert torch.equal(drawn(base, prompts, sampler), latents)


def test_concepts_folded_one_after_another_and_other_prompts_are_drawn_by_one_recording(
    base, recorder, concepts
):
    merged = Merged(base, [])
    try:
        for concept in concepts:
            merged.switch([(concept, 1.0)])
            assert_draws_the_same(base, [f"a <{concept.meta.name}>"])
    finally:
        merged.restore()
    assert (recorder.recorded, recorder.played) == (1, 4)


def test_an_attached_concept_is_drawn_with_its_own_weight(base, recorder, concepts):
    live = ConceptPipeline(base)
    live.add(concepts[0])
    try:
        for weight in (1.0, 0.3):
            live.set_weight("one", weight)
            assert_draws_the_same(base, ["a <one>"])
    finally:
        live.switch([])
    assert_draws_the_same(base, ["a toy"])
    assert recorder.recorded == 3


@pytest.mark.parametrize("tokens", [1, 1 << 20], ids=["folded", "two paths"])
def test_other_mixed_batches_share_one_recording(base, recorder, concepts, monkeypatch, tokens):
    products = fold_from(monkeypatch, tokens)
    one, two = concepts
    chosen = {"a <one>": [(one, 1.0)], "a <two>": [(two, 0.7)], "a toy": []}
    for prompts in (["a <one>", "a <two>"], ["a <two>", "a toy"], ["a <one>", "a <one>"]):
        assert_draws_the_same(base, prompts, MixedSampler(lambda prompt: chosen[prompt]))
    assert (recorder.recorded, recorder.played) == (1, 6)
    assert products.called == (tokens == 1)


def test_where_python_must_run_the_unet_is_not_recorded(base, recorder, concepts):
    unet = base.pipeline.unet
    handle = unet.mid_block.register_forward_hook(lambda *_: None)
    assert state_of(unet) is Obstacle.HOOKED
    handle.remove()
    with wrapped(base.pipeline, lambda processor: lambda *a, **k: processor(*a, **k)):
        assert state_of(unet) is Obstacle.ATTENTION
    live = ConceptPipeline(base)
    live.add(concepts[0])
    layer = next(m for m in unet.modules() if hasattr(m, "gate"))
    layer.gate = lambda adapter, x: True
    assert state_of(unet) is Obstacle.GATED
    layer.gate = None
    live.switch([])
    with base.recorded.replaying(unet, wanted=False):
        assert unet._compiled_call_impl is None
    assert base.recorded.obstacle is Obstacle.OFF and recorder.recorded == 0


def test_on_a_cpu_nothing_is_recorded(base):
    drawn(base, ["a toy"])
    assert base.recorded.obstacle is Obstacle.NOT_CUDA
    assert open_and_close(base).obstacle is Obstacle.NOT_CUDA


def open_and_close(base):
    training = open_single(base)
    training.close()
    return training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_training_and_drawing_replay_and_agree_with_eager():
    base = load_base("pocket", "cuda")
    for opened in (open_single, open_group):
        losses, _, obstacle = learned(opened(base))
        assert obstacle is None
        with eager(base):
            assert losses == [pytest.approx(own, rel=1e-3) for own in learned(opened(base))[0]]
    latents = drawn(base, ["a toy"])
    assert base.recorded.obstacle is None
    with eager(base):
        torch.testing.assert_close(drawn(base, ["a toy"]), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_gradients_of_a_recorded_layer_are_those_of_the_layer():
    layer = nn.Linear(8, 8, device="cuda")
    x = torch.randn(4, 8)
    layer(x.cuda()).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad(set_to_none=False)

    def work(inputs):
        loss = layer(inputs).square().sum()
        loss.backward()
        return loss.detach()

    gradients = [layer.weight.grad, layer.bias.grad]
    recorded = Recorded(work, torch.device("cuda"), adds_to=gradients)
    assert torch.equal(recorded(x), recorded(x))
    torch.testing.assert_close(layer.weight.grad, 2 * expected)
