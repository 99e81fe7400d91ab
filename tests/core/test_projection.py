"""An ordinary LoRA on a concept's indices: the nearest concept, and what is lost."""

import pytest
import torch

from sbora_diffusion.core.concept import read_concept, sealed, write_concept
from sbora_diffusion.core.errors import FormatError, NonFiniteError
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.layers import kind as kind_of
from sbora_diffusion.core.lora import LoraLayer, lora_layers
from sbora_diffusion.core.projection import energy, project
from tests.core.concept_examples import SHAPES, make_concept

OTHER = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(params=["fa", "fb"])
def onto(request):
    return sealed(make_concept("robot", request.param, alpha=6.0))


def ordinary(rank: int = 3, **more) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(1)
    return {
        layer: LoraLayer(
            torch.randn(rank, inputs, generator=generator),
            torch.randn(outputs, rank, generator=generator),
            0.5,
        )
        for layer, (outputs, inputs) in (SHAPES | more).items()
    }


def update(concept, layer):
    stored, meta = concept.layers[layer], concept.meta
    return delta_weight(meta.variant, stored.factor, stored.indices, SHAPES[layer], meta.scale)


def test_the_projection_has_the_loras_own_entries_at_the_owned_indices(onto):
    lora = ordinary()
    found = project(lora, onto, "borrowed")
    for layer in SHAPES:
        delta, indices = lora[layer].delta(), onto.layers[layer].indices.long()
        kept = torch.zeros_like(delta)
        at = (slice(None), indices) if onto.meta.variant == "fa" else (indices,)
        kept[at] = delta[at]
        torch.testing.assert_close(update(found.concept, layer), kept, rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_the_dense_updates_by_kind_and_overall(onto):
    lora = ordinary(**{OTHER: (12, 16)})
    found = project(lora, onto, "borrowed")
    lost, total = {}, {}
    for layer, own in lora.items():
        delta = own.delta().double()
        rest = delta - update(found.concept, layer).double() if layer in SHAPES else delta
        kind = kind_of(layer)
        lost[kind] = lost.get(kind, 0.0) + rest.square().sum().item()
        total[kind] = total.get(kind, 0.0) + delta.square().sum().item()
        assert energy(own) == pytest.approx(delta.square().sum().item(), rel=1e-5)
    assert found.kept.keys() == lost.keys()
    for kind, kept in found.kept.items():
        assert kept.loss == pytest.approx((lost[kind] / total[kind]) ** 0.5, rel=1e-4)
    overall = (sum(lost.values()) / sum(total.values())) ** 0.5
    assert found.overall.loss == pytest.approx(overall, rel=1e-4)
    assert (found.overall.layers, found.overall.matched) == (4, 3)
    assert found.kept["other layers"].loss == 1.0


def test_a_concepts_own_lora_loses_nothing(onto):
    lora = lora_layers([(onto, 1.0)])
    found = project(lora, onto, "again")
    assert found.overall.loss < 1e-6
    for layer, stored in onto.layers.items():
        assert torch.equal(found.concept.layers[layer].factor, stored.factor)


def test_the_result_is_a_valid_concept_in_the_range_of_the_other(onto, tmp_path):
    found = project(ordinary(), onto, "borrowed").concept
    write_concept(tmp_path / "c.safetensors", found)
    meta = read_concept(tmp_path / "c.safetensors").meta
    assert (meta.name, meta.tokens, meta.digest) == ("borrowed", (), found.meta.digest)
    assert (meta.start, meta.stop, meta.alpha) == (onto.meta.start, onto.meta.stop, 6.0)
    assert meta.fingerprint == onto.meta.fingerprint


def test_an_empty_lora_loses_nothing():
    layer = next(iter(SHAPES))
    outputs, inputs = SHAPES[layer]
    zero = LoraLayer(torch.zeros(2, inputs), torch.zeros(outputs, 2))
    found = project({layer: zero}, make_concept(), "nothing")
    assert found.overall.loss == 0.0 and list(found.concept.layers) == [layer]


def test_loras_that_do_not_fit_are_refused(onto):
    with pytest.raises(FormatError, match="none of the LoRA's 1 layers"):
        project({OTHER: ordinary(**{OTHER: (4, 4)})[OTHER]}, onto, "x")
    layer = next(iter(SHAPES))
    wide = LoraLayer(torch.ones(2, 99), torch.ones(16, 2))
    with pytest.raises(FormatError, match=r"99.*same base"):
        project({layer: wide}, onto, "x")
    conv = LoraLayer(torch.ones(2, 16, 3, 3), torch.ones(16, 2, 1, 1))
    with pytest.raises(FormatError, match="same base"):
        project({layer: conv}, onto, "x")
    broken = LoraLayer(torch.full((2, 16), torch.nan), torch.ones(16, 2))
    with pytest.raises(NonFiniteError):
        project({layer: broken}, onto, "x")
