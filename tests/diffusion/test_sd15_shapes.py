"""Folding in Stable Diffusion 1.5's sizes: 176 attention linears of random weights."""

import hashlib

import pytest
import torch

from sbora_diffusion.bench.standin import standin, standin_concept
from sbora_diffusion.core.folded_set import FoldedSet
from sbora_diffusion.diffusion.targets import target_layers

KINDS = (("a", "fa", 0), ("b", "fa", 39), ("c", "fb", 0), ("d", "fb", 39))  # 40 fit into 320


@pytest.fixture(scope="module")
def layers():
    return target_layers(standin(torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def digest_of_base(layers):
    return digest(layers)


@pytest.fixture(scope="module")
def concepts(layers):
    return [(standin_concept(layers, *kind), 0.7) for kind in KINDS]


def digest(layers) -> str:
    found = hashlib.sha256()
    for name in sorted(layers):
        found.update(layers[name].weight.numpy())
    return found.hexdigest()


def test_the_stand_in_has_the_layers_of_stable_diffusion(layers):
    unet = [layer.weight.shape for name, layer in layers.items() if name.startswith("unet.")]
    assert (len(unet), len(layers)) == (128, 176)
    # Trainable per unit of rank: FA trains a row of outputs, FB a column of inputs.
    assert (sum(s[0] for s in unet), sum(s[1] for s in unet)) == (99840, 99456)


def test_order_and_detours_do_not_matter_and_removal_gives_the_base(
    layers, digest_of_base, concepts
):
    folded = FoldedSet(layers)
    folded.switch(concepts)
    expected = digest(layers)
    assert expected != digest_of_base
    folded.switch(concepts[2:])
    folded.switch([(concepts[0][0], -1.0), *concepts[2:]])
    folded.switch(concepts[::-1])
    assert digest(layers) == expected
    folded.switch([])
    assert digest(layers) == digest_of_base


def test_untouched_entries_keep_their_bits(layers, digest_of_base, concepts):
    chosen = concepts[1:3]
    name = max(layers, key=lambda name: layers[name].weight.numel())
    before, folded = layers[name].weight.clone(), FoldedSet(layers)
    folded.switch(chosen)
    touched = torch.zeros(before.shape, dtype=torch.bool)
    touched[:, chosen[0][0].layers[name].indices.long()] = True
    touched[chosen[1][0].layers[name].indices.long()] = True
    same = layers[name].weight.view(torch.int32) == before.view(torch.int32)
    assert same[~touched].all() and (~same[touched]).float().mean() > 0.99
    folded.switch([])
    assert digest(layers) == digest_of_base
