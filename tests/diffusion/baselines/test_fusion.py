"""Gradient fusion, against least squares."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from sbora_diffusion.core.errors import NonFiniteError
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.baselines.adapted import Adapted, update_of
from sbora_diffusion.diffusion.baselines.custom_diffusion import READS_TEXT, token_ids
from sbora_diffusion.diffusion.baselines.fusion import (
    STOPPED_EARLY,
    FusionConfig,
    SecondMoment,
    fused_update,
    fusing,
)
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.baselines.quick import random_concept

SHORT = FusionConfig(pictures=2, steps=2, text_iterations=100, spatial_iterations=20)
PROMPTS = ("photo of a <{}>", "<{}>")


def moment(x):
    found = SecondMoment(x.shape[-1], x.device)
    found.add(x)
    return found


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_second_moments_count_every_input():
    x = random(2, 3, 4)
    found = SecondMoment(4, x.device)
    for row in x:
        found.add(row)
    assert found.count == 6
    rows = x.reshape(6, 4)
    torch.testing.assert_close(found.products, rows.T @ rows)


def test_the_fused_update_is_the_least_squares_of_all_concepts():
    inputs = [random(30 + k, 6, seed=k) for k in (1, 2, 3)]
    updates = [random(4, 6, seed=10 + k) for k in (1, 2, 3)]
    got = fused_update(updates, [moment(x) for x in inputs], 500, FusionConfig())
    right = sum(u @ x.T @ x for u, x in zip(updates, inputs, strict=True))
    expected = right @ torch.linalg.inv(sum(x.T @ x for x in inputs))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_a_concept_alone_keeps_its_outputs_and_changes_no_more_than_they_need():
    x, update = random(3, 6), random(4, 6, seed=1)
    got = fused_update([update], [moment(x)], 500, FusionConfig())
    torch.testing.assert_close(x @ got.T, x @ update.T, rtol=1e-6, atol=1e-6)
    expected = torch.linalg.lstsq(x, x @ update.T, driver="gelsd").solution.T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_its_iterations_are_those_on_the_mean_squared_error_itself(iterations):
    """As the authors minimise it: over all rows of inputs and outputs, from the base's weight."""
    inputs = [random(20, 6, seed=k) for k in (1, 2)]
    updates, own = [random(4, 6, seed=10 + k) for k in (1, 2)], random(4, 6, seed=3)
    rows = torch.cat(inputs)
    pairs = zip(inputs, updates, strict=True)
    wanted = torch.cat([x @ (own + u).T for x, u in pairs])
    weight = own.clone().requires_grad_(True)
    seen = []

    def closure():
        weight.grad = None
        loss = torch.nn.functional.mse_loss(rows @ weight.T, wanted)
        seen.append((loss.item(), weight.detach().clone()))
        loss.backward()
        return loss

    torch.optim.LBFGS(
        [weight], lr=1, max_iter=iterations, history_size=25, line_search_fn="strong_wolfe",
        tolerance_grad=1e-16, tolerance_change=1e-16,
    ).step(closure)  # fmt: skip
    got = fused_update(updates, [moment(x) for x in inputs], iterations, FusionConfig())
    best = min(seen, key=lambda entry: entry[0])[1]
    torch.testing.assert_close(own + got, best, rtol=1e-7, atol=1e-7)


@dataclass(frozen=True)
class Fused:
    """Concepts that were fused; all weights and inputs by layer.

    Attributes:
        now: the weights.
        heard: each concept's text states at its placeholder and the end.
        read: inputs (rows, in) of the other layers, each concept's own update in those of its kind.
    """

    concepts: list[Adapted]
    now: dict[str, torch.Tensor]
    heard: list[torch.Tensor]
    read: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "layerwise"])
def fused(thin, request):
    concepts = [random_concept(thin, name, layerwise=request.param) for name in ("one", "two")]
    own = weights(thin)
    with fusing(SHORT)(thin, [(concept, 1.0) for concept in concepts]):
        now, heard = weights(thin), [states_of(thin, concept) for concept in concepts]
        read = [{**words_of(thin, own, c), **pictures_of(thin, own, c)} for c in concepts]
    return Fused(concepts, now, heard, read)


def words_of(thin, own, concept, prompts=PROMPTS):
    text = of(thin, lambda name: name.startswith("text_encoder."))
    with own_updates(text, own, concept):
        return seen_by(text, partial(states_of, thin, concept, prompts))


def pictures_of(thin, own, concept):
    spatial = of(thin, lambda n: n.startswith("unet.") and not READS_TEXT.search(n))
    prompts = [f"photo of a <{concept.meta.name}>"] * 2
    draw = partial(draw_latents, thin, prompts, [0, 1], SHORT.steps, guidance=1.0)
    with own_updates(spatial, own, concept):
        return seen_by(spatial, draw)


def of(thin, choose):
    return {name: x for name, x in target_layers(thin.pipeline).items() if choose(name)}


def weights(thin):
    return {n: layer.weight.detach().clone() for n, layer in target_layers(thin.pipeline).items()}


@contextmanager
def own_updates(layers, own, concept):
    """Some layers with a concept's own update, whatever they had."""
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    put(layers, {n: own[n] + update_of(concept.layers[n], own[n]) for n in layers})
    yield
    put(layers, before)


@torch.no_grad()
def put(layers, weights):
    for name, layer in layers.items():
        layer.weight.copy_(weights[name])


def seen_by(layers, run):
    """Layer → its inputs (rows, in) while something runs."""
    seen = {name: [] for name in layers}
    with torch.no_grad(), watched(layers, lambda n, x: seen[n].append(x.flatten(0, -2).clone())):
        run()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def missing(update, inputs, updates):
    """Σ ‖(D − ΔW_i) X_i‖² as a share of Σ ‖ΔW_i X_i‖²."""
    pairs = [(x.double(), u.double()) for x, u in zip(inputs, updates, strict=True)]
    left = sum((x @ (update.double() - u).T).square().sum() for x, u in pairs)
    return (left / sum((x @ u.T).square().sum() for x, u in pairs)).item()


def test_keys_and_values_are_each_concepts_own_on_its_words(thin, fused):
    own = weights(thin)
    for number, name in enumerate(sorted(n for n in own if READS_TEXT.search(n))):
        for concept, states in zip(fused.concepts, fused.heard, strict=True):
            if concept.vectors.dim() == 3:
                states = states.chunk(concept.vectors.shape[1], -1)[number // 2]
            update = update_of(concept.layers[name], own[name])
            assert missing(fused.now[name] - own[name], [states], [update]) < 1e-4


def test_all_other_layers_are_fused_on_what_they_read_behind_the_layers_fused_before(thin, fused):
    """The text encoder's on words; in the UNet self-attention's four layers, the queries and
    outputs of cross-attention, on a picture."""
    own = weights(thin)
    kinds = {name.rpartition(".attn")[2] for name in fused.read[0] if name.startswith("unet.")}
    assert kinds == {"1.to_q", "1.to_k", "1.to_v", "1.to_out.0", "2.to_q", "2.to_out.0"}
    assert len(fused.read[0]) + sum(map(bool, map(READS_TEXT.search, own))) == len(own)
    for name in fused.read[0]:
        updates = [update_of(concept.layers[name], own[name]) for concept in fused.concepts]
        inputs = [read[name] for read in fused.read]
        spatial = name.startswith("unet.")
        iterations = SHORT.spatial_iterations if spatial else SHORT.text_iterations
        expected = fused_update(updates, [moment(x) for x in inputs], iterations, SHORT)
        got = fused.now[name] - own[name]
        left = missing(got, inputs, updates)
        assert left == pytest.approx(missing(expected, inputs, updates), abs=3e-3)
        assert missing(got, inputs, [expected] * 2) < 3e-3  # the same outputs
        for share in (1.0, 1 / len(updates)):  # the sum, and the mean
            assert left < 1.01 * missing(share * sum(updates), inputs, updates)


@torch.no_grad()
def states_of(base, concept, prompts=PROMPTS):
    """Text states of some prompts at the last words: of the usual ones, placeholder and end."""
    rows = []
    for prompt in prompts:
        ids = token_ids(base, prompt.format(concept.meta.name))
        states = base.pipeline.text_encoder(torch.tensor([ids]))[0][0]
        rows.append(states[-1 - len(concept.vectors) :])
    return torch.cat(rows)


def test_stopped_early_it_is_nearer_to_each_concept_than_sum_and_mean_on_prompts_unseen(thin):
    concepts, own = [random_concept(thin, name) for name in ("one", "two")], weights(thin)
    quick = STOPPED_EARLY.model_copy(update={"pictures": 1, "steps": 1})
    with fusing(quick)(thin, [(concept, 1.0) for concept in concepts]):
        now = weights(thin)
        prompts = ("a sketch of <{}> on a stage", "an image of <{}>, and a dog under water")
        read = [words_of(thin, own, concept, prompts) for concept in concepts]
    total = dict.fromkeys(("fused", "sum", "mean"), 0.0)
    for name in read[0]:
        updates = [update_of(concept.layers[name], own[name]) for concept in concepts]
        ways = {"fused": now[name] - own[name], "sum": sum(updates), "mean": sum(updates) / 2}
        for way, update in ways.items():
            total[way] += missing(update, [seen[name] for seen in read], updates)
    assert total["fused"] < 0.9 * min(total["sum"], total["mean"])


def test_a_weight_is_a_factor_of_what_is_wanted(thin):
    concept, own = random_concept(thin, "one"), weights(thin)
    with fusing(SHORT)(thin, [(concept, 0.5)]):
        layers = target_layers(thin.pipeline)
        states = states_of(thin, concept)
        for name in (n for n in layers if READS_TEXT.search(n)):
            update = 0.5 * update_of(concept.layers[name], own[name])
            assert missing(layers[name].weight.detach() - own[name], [states], [update]) < 1e-4


def test_a_broken_concept_leaves_the_base_as_it_was(thin):
    concept = random_concept(thin, "one")
    layers = {name: dict(parts) for name, parts in concept.layers.items()}
    layers[max(layers)]["up"] = layers[max(layers)]["up"] * float("inf")
    broken = Adapted(concept.meta, layers, concept.vectors)
    with pytest.raises(NonFiniteError, match="not finite"):
        fusing(SHORT)(thin, [(broken, 1.0)])
