"""A file may store more than updates of weights; nobody may draw or write it without that part."""

import pytest
import torch

from sbora_diffusion.core.concept import Concept, LayerFactor, read_concept, write_concept
from sbora_diffusion.core.concept_set import read_concept_set, write_concept_set
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.formats import write_lora
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import ConceptPipeline
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def plain(pocket, tmp_path_factory) -> Concept:
    return strong_concept(pocket, tmp_path_factory.mktemp("plain"), "plain")


@pytest.fixture(scope="module")
def biased(pocket, tmp_path_factory) -> Concept:
    """A valid file in which one layer has a bias."""
    folder = tmp_path_factory.mktemp("biased")
    concept = strong_concept(pocket, folder, "biased", slot=1)
    stored = concept.layers[LAYER]
    bias = {"bias": torch.ones(stored.factor.shape[0])}
    layers = {**concept.layers, LAYER: LayerFactor(stored.indices, stored.factor, bias)}
    write_concept(folder / "b.safetensors", Concept(concept.meta, layers, concept.embeddings))
    return read_concept(folder / "b.safetensors")


def attach(base, pairs, _folder):
    ConceptPipeline(base).add(pairs[1][0])


def switch(base, pairs, _folder):
    pipeline = ConceptPipeline(base)
    pipeline.switch(pairs[:1])
    try:
        pipeline.switch(pairs)
    finally:
        assert list(pipeline.concepts) == ["plain"]  # on an error nothing is changed
        pipeline.switch([])


def fold(base, pairs, _folder):
    Merged(base, pairs)


def export(_base, pairs, folder):
    try:
        write_lora(folder / "lora", pairs)
    finally:
        assert not (folder / "lora").exists()


def predict(base, pairs, _folder):
    Calibrated(base).forecast(pairs, ["plain", "biased"])


@pytest.mark.parametrize("way", [attach, switch, fold, export, predict])
def test_a_bias_that_would_be_ignored_is_refused_and_nothing_changes(
    pocket, plain, biased, tmp_path, way
):
    before = snapshot(pocket)
    with pytest.raises(FormatError, match=rf"'biased' stores 1 tensors .*{LAYER}\.bias"):
        way(pocket, [(plain, 1.0), (biased, 1.0)], tmp_path)
    assert_untouched(pocket, before)


def test_a_set_carries_the_bias_along(plain, biased, tmp_path):
    write_concept_set(tmp_path / "set.safetensors", [(plain, 1.0), (biased, 0.5)])
    found = {c.meta.name: c for c, _ in read_concept_set(tmp_path / "set.safetensors").concepts}
    assert found["biased"].layers[LAYER].extras["bias"].eq(1).all()
    assert found["biased"].meta.digest == biased.meta.digest
