"""Prompts of different concepts drawn in one pass are those drawn one by one."""

import pytest
import torch

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import ConfigError, ConflictError
from sbora_diffusion.diffusion.mixed import MixedSampler, mixed_concepts
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from tests.diffusion.helpers import assert_untouched, fold_from, snapshot, strong_concept

SMALL = {"steps": 2, "guidance": 4.0, "negative_prompt": "blurry", "size": (64, 64)}
PROMPTS = ["a <one> on grass", "a cat", "a <twin>", "<row> and <one>", "a <one> on grass"]


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory) -> dict[str, Concept]:
    """FA and FB, of two ranks; "twin" has the slot of "one"."""
    folder = tmp_path_factory.mktemp("mixed")
    return {
        "one": strong_concept(pocket, folder, "one"),
        "twin": strong_concept(pocket, folder, "twin", rank=4, vectors=1),
        "row": strong_concept(pocket, folder, "row", variant="fb", slot=1),
    }


def called(strong, prompt: str) -> list[tuple[Concept, float]]:
    return [(c, 0.7 if n == "row" else 1.0) for n, c in strong.items() if f"<{n}>" in prompt]


def one_by_one(pocket, strong) -> torch.Tensor:
    live, latents = ConceptPipeline(pocket), []
    for seed, prompt in enumerate(PROMPTS):
        live.switch(called(strong, prompt), allow_overlap=True)
        latents.append(draw_latents(pocket, [prompt], [seed], **SMALL))
    live.switch([])
    return torch.cat(latents)


@pytest.mark.parametrize("tokens", [1, 1 << 20], ids=["folded", "two paths"])
def test_a_mixed_batch_equals_drawing_one_by_one_and_leaves_no_trace(
    pocket, strong, tokens, monkeypatch
):
    products = fold_from(monkeypatch, tokens)
    before = snapshot(pocket)
    expected = one_by_one(pocket, strong)
    sampler = MixedSampler(lambda prompt: called(strong, prompt))
    seeds = list(range(len(PROMPTS)))
    mixed = sampler(pocket, PROMPTS, seeds, **SMALL)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert products.called == (tokens == 1)
    assert_untouched(pocket, before)
    bare = draw_latents(pocket, PROMPTS[:1], [0], **SMALL)
    assert (bare - expected[:1]).abs().max() > 0.05  # the concepts clearly act


def test_what_cannot_be_mixed_is_refused_and_changes_nothing(pocket, strong, tmp_path):
    before = snapshot(pocket)
    one, twin, row = ((strong[name], 1.0) for name in ("one", "twin", "row"))
    stranger = strong_concept(pocket, tmp_path, "one", slot=5)
    for rows, error in (
        ([[one, twin], [row]], ConflictError),
        ([[one], [(stranger, 1.0)]], ConflictError),
        ([[one], [(strong["row"], float("nan"))]], ConfigError),
    ):
        with pytest.raises(error), mixed_concepts(pocket, rows):
            pass
        assert_untouched(pocket, before)
    with pytest.raises(ConfigError, match="<one> in a negative prompt"):
        MixedSampler(lambda prompt: [])(pocket, ["a"], [0], 1, 1.0, "no <one>")
