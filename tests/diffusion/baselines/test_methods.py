"""What holds for every method of the comparison."""

import gc

import pytest
import torch

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, FormatError
from sbora_diffusion.diffusion.baselines.adapted import update_of
from sbora_diffusion.diffusion.baselines.registry import METHODS
from sbora_diffusion.diffusion.lesson import Stream
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.baselines.quick import RANK, quick, random_concept
from tests.diffusion.helpers import snapshot
from tests.diffusion.thin_families import thin_family

TRAINED = [name for name in METHODS if name != "class-word"]
ADDED = {"sum": 1.0, "sum-0.6": 0.6, "mean": 0.5}


@pytest.fixture(scope="module")
def concepts(thin, subjects):
    """Method → two concepts and the losses of their steps; the same batch in each step."""
    first: dict[int, object] = {}
    drawn = Stream.draw

    def same(stream, objective, size):
        kept = first.setdefault(id(stream), (stream, drawn(stream, objective, size)))
        return kept[1]

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "draw", same)
        patch.setattr(gc, "collect", lambda *_: 0)  # Accelerate's, most of the time
        for name, method in METHODS.items():
            losses: list[tuple[float, ...]] = []

            def note(names, record, losses=losses):
                losses.append(record.losses)

            trained = method.train(thin, subjects, quick(method), on_step=note)
            found[name] = trained, losses
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_of_each_concept(concepts, name):
    _, losses = concepts[name]
    assert len(losses) == 3
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first


def updates(concept, own):
    """Layer → ΔW, fp64."""
    if not isinstance(concept, Concept):
        return {n: update_of(parts, own[n]).double() for n, parts in concept.layers.items()}
    found, dim = {}, 1 if concept.meta.variant == "fa" else 0
    for name, stored in concept.layers.items():
        found[name] = torch.zeros(own[name].shape, dtype=torch.float64).index_add(
            dim, stored.indices.long(), stored.factor.double()
        )
    return found


def weights(base):
    return {n: x.weight.detach().clone() for n, x in target_layers(base.pipeline).items()}


@pytest.mark.parametrize("name", TRAINED)
def test_training_changes_what_the_recipe_gives_a_rate_alone(thin, concepts, name):
    config, own = quick(METHODS[name]), weights(thin)
    for concept in concepts[name][0]:
        moved = {layer for layer, update in updates(concept, own).items() if update.any()}
        expected = {
            layer
            for layer in target_layers(thin.pipeline, config.targets)
            if config.rate_unet
            and not (name == "custom-diffusion" and "attn2.to_q" in layer)
            and not (name == "custom-diffusion" and "attn2.to_out" in layer)
        }
        assert moved == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_concept_alone_is_the_base_with_its_update(thin, concepts, name):
    own = weights(thin)
    for concept in concepts[name][0]:
        expected = {layer: own[layer] + u for layer, u in updates(concept, own).items()}
        with METHODS[name].alone(thin, concept):
            now = weights(thin)
            for layer, weight in now.items():
                wanted = expected.get(layer, own[layer]).float()
                torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
            words = thin.pipeline.tokenizer(METHODS[name].words(concept)).input_ids
            assert thin.pipeline.tokenizer.unk_token_id not in words[1:-1]


@pytest.mark.parametrize(
    ("name", "how"), [(n, h) for n in METHODS for h in METHODS[n].merges if h in ADDED]
)
def test_sums_are_weighted_sums_of_the_updates_and_any_merge_can_be_undone(
    thin, concepts, name, how
):
    method, own, before = METHODS[name], weights(thin), snapshot(thin)
    pair = concepts[name][0]
    with method.merged(thin, pair, how):
        now = weights(thin)
        vocabulary = thin.pipeline.tokenizer.get_added_vocab()
        assert all(name == "class-word" or method.words(c) in vocabulary for c in pair)
    both = [updates(concept, own) for concept in pair]
    for layer, weight in now.items():
        expected = own[layer] + ADDED[how] * sum(u[layer] for u in both if layer in u)
        torch.testing.assert_close(weight.double(), expected.double(), rtol=1e-5, atol=1e-6)
    after = snapshot(thin)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_calibrated_concepts_can_be_taken_out_and_one_is_not_fitted(thin, concepts):
    method, own = METHODS["sbora"], weights(thin)
    pair = concepts["sbora"][0]
    with method.merged(thin, pair):
        assert any(not torch.equal(own[n], w) for n, w in weights(thin).items())
    with method.merged(thin, pair[:1]):
        one = weights(thin)
    with method.alone(thin, pair[0]):
        assert all(torch.equal(one[n], w) for n, w in weights(thin).items())


@pytest.mark.parametrize("name", METHODS)
def test_a_file_gives_the_concept_back_and_the_same_bytes_again(concepts, name, tmp_path):
    method, concept = METHODS[name], concepts[name][0][1]
    method.write(tmp_path / "one.safetensors", concept)
    back = method.read(tmp_path / "one.safetensors")
    method.write(tmp_path / "two.safetensors", back)
    assert back.meta == concept.meta
    assert method.trainable(back) == method.trainable(concept)
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("name", ["sbora-fa", "lora", "textual-inversion"])
def test_a_file_of_another_method_is_refused(concepts, name, tmp_path):
    method, other = METHODS[name], METHODS["sbora-fb" if name == "sbora-fa" else "dora"]
    method.write(tmp_path / "file.safetensors", concepts[name][0][0])
    with pytest.raises(FormatError, match=r"file\.safetensors is"):
        other.read(tmp_path / "file.safetensors")


def test_trainable_numbers_are_counted_without_what_is_frozen(thin, concepts):
    layers = target_layers(thin.pipeline)
    inputs, outputs = (sum(x.weight.shape[k] for x in layers.values()) for k in (1, 0))
    unet = sum(x.out_features for x in target_layers(thin.pipeline, "unet").values())
    keys = [x for n, x in layers.items() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    expected = {
        "sbora-fa": RANK * outputs,
        "sbora-fb": RANK * inputs,
        "lora": RANK * (inputs + outputs),
        "lora-fa": RANK * outputs,
        "dora": RANK * (inputs + outputs) + outputs,
        "orthogonal": RANK * unet,
        "mix-of-show": RANK * (inputs + outputs),
        "custom-diffusion": sum(x.weight.numel() for x in keys),
        "textual-inversion": 0,
        "class-word": 0,
    }
    for name, count in expected.items():
        assert METHODS[name].trainable(concepts[name][0][0]).weights == count, name
    tokens = {n: METHODS[n].trainable(concepts[n][0][0]).tokens // 64 for n in expected}
    assert tokens["mix-of-show"] == tokens["orthogonal"] == 2 * 4 and tokens["class-word"] == 0
    assert tokens["custom-diffusion"] == tokens["textual-inversion"] == 1


def test_controls_have_the_indices_that_they_are_named_for(concepts):
    def indices(name):
        one, other = (c.layers for c in concepts[name][0])
        return [(set(one[n].owned), set(other[n].owned)) for n in one]

    assert all(one.isdisjoint(other) for one, other in indices("sbora-fa"))
    assert all(one == other for one, other in indices("sbora-fa-same"))
    random = indices("sbora-fa-random")
    assert any(one & other for one, other in random) and all(one != other for one, other in random)


def test_concepts_follow_from_slot_and_seed_and_not_from_who_trains_beside_them(thin, subjects):
    method = METHODS["lora-fa"]
    config = quick(method, steps=1)
    (alone,) = method.train(thin, subjects[1:], config, slots=[1])
    _, beside = method.train(thin, subjects, config, slots=[0, 1])
    for layer, parts in alone.layers.items():
        assert torch.equal(parts["down"], beside.layers[layer]["down"])


def test_wrong_merges_are_refused_in_one_line_and_change_nothing(thin):
    method, concept = METHODS["lora"], random_concept(thin, "one")
    with pytest.raises(ConfigError, match="LoRA cannot be merged by 'fusion'"):
        method.merged(thin, [concept], "fusion")
    with pytest.raises(ConfigError, match="no concepts"):
        method.merged(thin, [])
    with pytest.raises(ConfigError, match="weight"):
        method.merged(thin, [concept], weight=float("nan"))
    with pytest.raises(ConflictError, match="two concepts have the name 'one'"):
        method.merged(thin, [concept, concept])
    stranger = random_concept(thin, "two")
    meta = stranger.meta.model_copy(update={"base_key": "sd1-0"})
    with pytest.raises(BaseMismatch, match="trained on the base sd1-0"):
        method.merged(thin, [concept, type(stranger)(meta, stranger.layers, stranger.vectors)])
    with method.alone(thin, concept), pytest.raises(ConflictError, match="folded"):
        method.merged(thin, [concept])


def test_slots_and_subjects_must_be_as_many(thin, subjects):
    with pytest.raises(ConfigError, match="1 slots for 2 subjects"):
        METHODS["lora"].train(thin, subjects, slots=[0])


@pytest.mark.parametrize("name", [n for n in TRAINED if not n.startswith("sbora")])
def test_a_base_with_several_text_encoders_is_refused_in_one_line(several, subjects, name):
    said = "a method compared with cannot work yet with a base of family sdxl; give a base with one"
    method = METHODS[name]
    with pytest.raises(ConfigError, match=said) as caught:
        method.train(several, subjects[:1], quick(method))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def several(pocket):
    return thin_family("sdxl", pocket)
