"""A prompt activates the concepts that it names, out of any number that are known."""

import numpy as np
import pytest
import torch

from sbora_diffusion.core.concept import Concept, LayerFactor
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, FormatError
from sbora_diffusion.diffusion import routing
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents, generate
from sbora_diffusion.diffusion.routing import Router, Source
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

pytestmark = pytest.mark.usefixtures("small_pictures")

FAST = {"steps": 1, "guidance": 1.0}
BATCH = ["a <one>", "a cat", "<two> and <one>", "on grass <one>"]
SMALL = {**FAST, "size": (64, 64)}


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory) -> dict[str, Concept]:
    """Three concepts, the last in the slot of the first."""
    folder = tmp_path_factory.mktemp("strong")
    slots = {"one": 0, "two": 1, "twin": 0}
    return {name: strong_concept(pocket, folder, name, slot=slot) for name, slot in slots.items()}


@pytest.fixture
def live(pocket):
    before = snapshot(pocket)
    concepts = ConceptPipeline(pocket)
    yield concepts
    concepts.switch([])
    assert_untouched(pocket, before)


class Shelf:
    """Sources that count how often they are read; the unnamed ones cannot be read at all."""

    def __init__(self, concepts: dict[str, Concept], unreadable: int = 0):
        self.read: list[str] = []
        self.sources = [self._source(name, concept) for name, concept in concepts.items()]
        self.sources += [self._source(f"other{k}", None) for k in range(unreadable)]

    def _source(self, name: str, concept: Concept | None) -> Source:
        def read() -> Concept:
            assert concept, f"{name} was read"
            self.read.append(name)
            return concept

        return Source(name, f"<{name}>", f"{name}.safetensors", read)


def names(weighted) -> list[str]:
    return sorted(concept.meta.name for concept, _ in weighted)


def test_only_what_a_prompt_names_is_read_and_active_however_much_is_known(live, strong):
    shelf = Shelf(strong, unreadable=200)  # far more than the 20 slots of rank 8 that the base has
    router = Router(live, shelf.sources)
    assert shelf.read == []
    for prompt, expected in (
        ("a <TWO> on grass", ["two"]),
        ("<two>s and a <One>", ["one", "two"]),
        ("a twin of one, 1<2>0", []),
        ("a <twin>", ["twin"]),
    ):
        live.switch(router.concepts_for(prompt))
        assert sorted(live.concepts) == expected
    assert sorted(shelf.read) == ["one", "twin", "two"]  # once each


def test_concepts_that_share_a_slot_are_refused_only_when_one_prompt_names_both(live, strong):
    router, calls = Router(live, Shelf(strong).sources), []
    prompts = ["a <one>", "a <twin>", "a <one> with its <twin>"]
    router.draw(prompts[:2], [0, 0], on_step=lambda *call: calls.append(call), **FAST)
    assert calls == [(1, 1)]  # in one batch, where they do not meet
    live.switch([])
    with pytest.raises(ConflictError, match="'one' and 'twin' share 576 indices in 72 layers"):
        router.draw(prompts, [0, 0, 0], **FAST)
    assert live.concepts == {}  # refused before anything was drawn


@pytest.fixture(scope="module")
def one_by_one(pocket, strong) -> list[np.ndarray]:
    """Pictures of `BATCH`, each drawn by itself with just its concepts attached."""
    live, pictures = ConceptPipeline(pocket), []
    for k, prompt in enumerate(BATCH):
        live.switch([(c, 1.0) for n, c in strong.items() if f"<{n}>" in prompt])
        pictures.append(np.asarray(generate(pocket, prompt, seed=k, **FAST)[0], int))
    live.switch([])
    return pictures


@pytest.mark.parametrize("holder", [ConceptPipeline, Merged])
def test_prompts_of_several_sets_share_a_batch_and_come_back_in_the_order_asked(
    pocket, strong, one_by_one, holder
):
    before, calls = snapshot(pocket), []
    held = holder(pocket)
    router = Router(held, Shelf(strong).sources)
    batch = router.draw(BATCH, range(4), on_step=lambda *call: calls.append(call), **FAST)
    held.switch([])
    assert_untouched(pocket, before)
    assert calls == [(1, 1)]
    for drawn, alone in zip(batch, one_by_one, strict=True):
        assert np.abs(np.asarray(drawn, int) - alone).max() <= 1


def test_sets_that_fill_a_batch_are_drawn_by_themselves_and_only_the_others_mixed(
    live, strong, monkeypatch
):
    batches = []

    def note(base, prompts, seeds, steps, sampler=None, **options):
        active = sorted(live.concepts)
        batches.append((list(prompts), active, sampler is not None))
        return list(prompts)

    monkeypatch.setattr(routing, "draw", note)
    router = Router(live, Shelf(strong).sources)
    prompts = ["a cat", "<one> 1", "<two>", "<one> 2", "<one> 3", "<one> 4"]
    ones = [prompt for prompt in prompts if "one" in prompt]
    assert router.draw(prompts, range(6)) == prompts
    assert batches == [(ones, ["one"], False), (["a cat", "<two>"], [], True)]
    for options in ({"sampler": draw_latents}, {"negative_prompt": "a <cat>"}):
        batches.clear()
        assert router.draw(["a cat", "<two>"], range(2), **options) == ["a cat", "<two>"]
        assert [active for _, active, _ in batches] == [[], ["two"]]


def test_concepts_that_are_always_active_keep_their_weight_and_their_token(live, strong):
    shelf = Shelf(strong)
    router = Router(live, shelf.sources, always=[(strong["one"], 0.5)])
    weights = {c.meta.name: weight for c, weight in router.concepts_for("a <one> and a <two>")}
    assert weights == {"one": 0.5, "two": 1.0} and shelf.read == ["two"]
    assert names(router.concepts_for("grass")) == ["one"]


def test_a_token_of_two_concepts_is_refused_only_when_it_is_called(live, strong):
    sources = Shelf(strong).sources
    double = Source("double", "<one>", "double.safetensors", lambda: strong["one"])
    router = Router(live, [*sources, double])
    assert names(router.concepts_for("a <two>")) == ["two"]
    with pytest.raises(ConflictError, match=r"<one> is the token of one\.saf.* and of double\.saf"):
        router.called("a <One>")


def test_tokens_that_nobody_knows_are_named_with_the_nearest_one(live, strong):
    router = Router(live, Shelf(strong).sources)
    assert router.unknown("a <twon>, a <one>, a <elephant> and 1<2>0") == {
        "<twon>": "<two>",
        "<elephant>": None,
        "<2>": None,
    }
    live.switch([(strong["twin"], 1.0)])
    assert Router(live, []).unknown("a <twin> and a <two>") == {"<two>": None}


def test_a_token_in_another_case_draws_the_same_with_all_its_vectors(live, strong):
    live.switch([(strong["one"], 1.0)])
    assert len(strong["one"].embeddings["text_encoder.<one>"]) == 2
    lower, upper = (draw_latents(live.base, [f"a {t} on grass"], [0], **SMALL)
                    for t in ("<one>", "<ONE>"))  # fmt: skip
    assert torch.equal(lower, upper)
    assert live.unmentioned("a <One>") == [] and live.unmentioned("a <one2>") == ["one"]


def test_switching_gives_what_a_fresh_pipeline_gives(pocket, live, strong):
    one, two = (strong["one"], 1.0), (strong["two"], 0.7)
    for concepts in ([two, one], [], [two], [(strong["twin"], 1.0), two]):
        live.switch(concepts)
        switched = draw_latents(pocket, ["a <one> and a <two>"], [0], **SMALL)
        live.switch([])
        fresh = ConceptPipeline(pocket)
        for concept, weight in reversed(concepts):
            fresh.add(concept, weight)
        assert torch.equal(draw_latents(pocket, ["a <one> and a <two>"], [0], **SMALL), switched)
        fresh.switch([])
        live.switch(concepts)


def test_a_switch_that_is_refused_changes_nothing(pocket, live, strong, tmp_path):
    live.switch([(strong["one"], 0.5)])
    before = draw_latents(pocket, ["a <one>"], [0], **SMALL)
    layer = min(pocket.fingerprint)
    alien = strong_concept(pocket, tmp_path, "alien", slot=2,
                           fingerprint={**pocket.fingerprint, layer: "0" * 48})  # fmt: skip
    for wrong, error in (
        ([(strong["two"], 1.0), (alien, 1.0)], BaseMismatch),
        ([(strong["one"], 1.0), (strong["twin"], 1.0)], ConflictError),
        ([(strong["one"], float("nan"))], ConfigError),
    ):
        with pytest.raises(error):
            live.switch(wrong)
        assert torch.equal(draw_latents(pocket, ["a <one>"], [0], **SMALL), before)


def test_a_concept_that_does_not_fit_the_layers_leaves_none_attached(live, strong):
    concept = strong["two"]
    layer = min(concept.layers)
    wrong = LayerFactor(concept.layers[layer].indices, concept.layers[layer].factor[:1])
    misfit = Concept(concept.meta, {**concept.layers, layer: wrong}, concept.embeddings)
    with pytest.raises(FormatError, match="has shape"):
        live.switch([(strong["one"], 1.0), (misfit, 1.0)])
    assert live.concepts == {}
