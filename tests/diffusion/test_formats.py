"""One LoRA of several concepts, loaded by stock diffusers, draws what the merged model draws."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sbora_diffusion.core.errors import ConflictError, NonFiniteError
from sbora_diffusion.core.functional import delta_weight
from sbora_diffusion.core.storage import decode
from sbora_diffusion.diffusion.bases import POCKET, Base
from sbora_diffusion.diffusion.formats import LORA_FILE, lora_tensors, write_lora
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
    tensors = lora_tensors(concepts)
    layers = target_layers(pocket.pipeline)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert down.shape[0] == up.shape[1] == 20
        expected = torch.zeros(layer.weight.shape)
        for concept, weight in concepts:
            stored, meta = concept.layers[name], concept.meta
            expected += delta_weight(
                meta.variant, stored.factor, stored.indices, tuple(expected.shape),
                weight * meta.scale,
            )  # fmt: skip
        torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-7)


def test_one_fa_concept_is_exact_in_every_entry(concepts):
    ((concept, _),) = concepts[:1]
    tensors = lora_tensors([(concept, 1.0)])
    for name, stored in concept.layers.items():
        assert torch.equal(tensors[f"{name}.lora_B.weight"], stored.factor)
        assert tensors[f"{name}.lora_A.weight"].sum(1).eq(1).all()


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
    names = ["pytorch_lora_weights.safetensors", "sbora.json"]
    names += [f"token_{name}.safetensors" for name in ("one", "rows", "two")]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert [file.name for file in first] == names[2:]
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
    for name, value in lora_tensors(concepts).items():
        assert torch.equal(tensors[name], value.half())
    with pytest.raises(NonFiniteError, match="lora_"):
        write_lora(tmp_path / "loud", [(concepts[0][0], 1e8)], dtype=torch.float16)
    assert not (tmp_path / "loud").exists()
