"""One LoRA of several concepts, loaded by stock diffusers, draws what the merged model draws."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sbora_diffusion.core.errors import ConflictError, NonFiniteError
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.lora import lora_layers
from sbora_diffusion.core.storage import decode
from sbora_diffusion.diffusion.bases import POCKET, Base
from sbora_diffusion.diffusion.formats import LORA_FILE, write_lora
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import strong_concept

PROMPT = ["a photo of <one> and <rows>"]


@pytest.fixture(scope="module")
def concepts(pocket, tmp_path_factory):
    """FA of rank 8, FA of rank 4 with alpha 6, and FB."""
    folder = tmp_path_factory.mktemp("strong")
    return [
        (strong_concept(pocket, folder, "one"), 0.4),
        (strong_concept(pocket, folder, "two", rank=4, slot=2, vectors=1, alpha=6.0), -0.2),
        (strong_concept(pocket, folder, "rows", "fb"), 0.3),
    ]


def test_the_product_of_the_factors_is_the_sum_of_the_concepts_updates(pocket, concepts):
    loras, layers = lora_layers(concepts), target_layers(pocket.pipeline)
    assert loras.keys() == layers.keys()
    for name, layer in layers.items():
        assert loras[name].rank == loras[name].alpha == 20
        expected = torch.zeros(layer.weight.shape)
        for concept, weight in concepts:
            stored, meta = concept.layers[name], concept.meta
            expected += delta_weight(
                meta.variant, stored.factor, stored.indices, tuple(expected.shape),
                weight * meta.scale,
            )  # fmt: skip
        torch.testing.assert_close(loras[name].delta(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_concept_is_exact_in_every_entry_with_its_own_alpha(concepts, number):
    concept, weight = concepts[number]
    meta, apart = concept.meta, lora_layers([(concept, weight)])
    inside = lora_layers([(concept, weight)], unit_scale=True)
    for name, stored in concept.layers.items():
        fa, lora = meta.variant == "fa", apart[name]
        trained, fixed = (lora.up, lora.down) if fa else (lora.down, lora.up.T)
        assert torch.equal(trained, stored.factor) and lora.scale == weight * meta.scale
        assert torch.equal(fixed.sum(1), torch.ones(meta.rank))
        shape = (lora.up.shape[0], lora.down.shape[1])
        scale = weight * meta.scale
        expected = delta_weight(meta.variant, stored.factor, stored.indices, shape, scale)
        assert torch.equal(lora.delta(), expected)
        assert torch.equal(inside[name].delta(), expected) and inside[name].scale == 1.0


def test_disjoint_concepts_give_the_folds_own_updates_bit_for_bit(concepts):
    pairs = concepts[:2]
    for name, lora in lora_layers(pairs).items():
        expected = torch.zeros(lora.up.shape[0], lora.down.shape[1])
        for concept, weight in pairs:
            stored, scale = concept.layers[name], weight * concept.meta.scale
            shape = tuple(expected.shape)
            expected += delta_weight("fa", stored.factor, stored.indices, shape, scale)
        assert torch.equal(lora.delta(), expected)


def test_stock_diffusers_draws_the_merged_models_latents(pocket, concepts, tmp_path):
    merged = Merged(pocket, concepts)
    try:
        expected = draw_latents(pocket, PROMPT, [0], 3)
    finally:
        merged.restore()
    files = write_lora(tmp_path / "lora", concepts)
    stock = StableDiffusionPipeline.from_pretrained(
        POCKET, safety_checker=None, local_files_only=True
    )
    stock.set_progress_bar_config(disable=True)
    plain = draw_latents(Base("stock", stock, "pocket"), PROMPT, [0], 3)
    stock.load_lora_weights(str(tmp_path / "lora"))
    stock.load_textual_inversion([str(file) for file in files])
    found = draw_latents(Base("stock", stock, "pocket"), PROMPT, [0], 3)
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_files_do_not_depend_on_the_order_and_record_what_is_in_them(concepts, tmp_path):
    first = write_lora(tmp_path / "a", concepts)
    write_lora(tmp_path / "b", concepts[::-1])
    names = [f"embeddings/{name}.safetensors" for name in ("one", "rows", "two")]
    assert [str(file.relative_to(tmp_path / "a")) for file in first] == names
    written = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    names += ["README.md", "pytorch_lora_weights.safetensors", "sbora.json"]
    assert sorted(str(file.relative_to(tmp_path / "a")) for file in written) == sorted(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "sbora.json").read_text())
    assert {c["name"]: c["weight"] for c in record["concepts"]} == {
        "one": 0.4, "two": -0.2, "rows": 0.3,
    }  # fmt: skip
    assert (record["allow_overlap"], record["overlaps"]) == (False, [])
    _, metadata = decode(tmp_path / "a" / LORA_FILE)
    assert json.loads(metadata["sbora"]) == record


def test_shared_indices_are_refused_unless_allowed_and_then_recorded(pocket, concepts, tmp_path):
    pairs = [concepts[0], (strong_concept(pocket, tmp_path, "double"), 1.0)]
    with pytest.raises(ConflictError, match="share 576 indices in 72 layers"):
        write_lora(tmp_path / "lora", pairs)
    assert not (tmp_path / "lora").exists()
    write_lora(tmp_path / "lora", pairs, allow_overlap=True)
    record = json.loads((tmp_path / "lora" / "sbora.json").read_text())
    (found,) = record["overlaps"]
    assert record["allow_overlap"] is True and set(found["concepts"]) == {"one", "double"}
    assert (found["layers"], found["indices"]) == (72, 576)


def test_half_precision_rounds_once_and_refuses_what_does_not_fit(concepts, tmp_path):
    write_lora(tmp_path / "half", concepts, dtype=torch.float16)
    tensors, _ = decode(tmp_path / "half" / LORA_FILE)
    for name, lora in lora_layers(concepts).items():
        assert torch.equal(tensors[f"{name}.lora_A.weight"], lora.down.half())
        assert torch.equal(tensors[f"{name}.lora_B.weight"], lora.up.half())
    with pytest.raises(NonFiniteError, match=r"float16.*lower the weights"):
        write_lora(tmp_path / "loud", [(concepts[0][0], 1e8)], dtype=torch.float16)
    assert not (tmp_path / "loud").exists()
