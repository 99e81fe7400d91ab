import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import safe_open

from sbora_diffusion.core.allocation import indices_for
from sbora_diffusion.core.concept import (
    Concept,
    public_base_name,
    read_concept,
    sealed,
    write_concept,
)
from sbora_diffusion.core.errors import (
    CapacityError,
    FormatError,
    NonFiniteError,
)
from tests.core.concept_examples import SHAPES, make_base, make_concept

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "robot.safetensors"
    write_concept(path, make_concept())
    return path


def changed(concept: Concept, layer: str = TO_K, **parts) -> Concept:
    stored = dataclasses.replace(concept.layers.get(layer, concept.layers[TO_K]), **parts)
    return dataclasses.replace(concept, layers={**concept.layers, layer: stored})


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_concept_survives_writing_and_reading(tmp_path, variant, dtype):
    concept = make_concept(variant=variant, slot=1)
    layer = concept.layers[TO_K]
    concept = changed(
        concept, factor=layer.factor.to(dtype), extras={"bias": torch.arange(16.0).to(dtype)}
    )
    digest = write_concept(tmp_path / "c.safetensors", concept)
    back = read_concept(tmp_path / "c.safetensors")
    assert back.meta == concept.meta.model_copy(update={"digest": digest})
    assert list(back.layers) == sorted(SHAPES)
    for name, stored in concept.layers.items():
        assert torch.equal(back.layers[name].indices, stored.indices)
        assert torch.equal(back.layers[name].factor, stored.factor)
        assert back.layers[name].factor.dtype == stored.factor.dtype
        assert back.layers[name].extras.keys() == stored.extras.keys()
    assert torch.equal(back.layers[TO_K].extras["bias"], torch.arange(16.0).to(dtype))
    assert back.embeddings.keys() == concept.embeddings.keys()
    assert torch.equal(*(c.embeddings["text_encoder.<robot>"] for c in (concept, back)))
    assert back.meta.scale == 1.0


def test_types_of_training_settings_survive(tmp_path):
    training = {"a": 1, "b": 1.0, "c": True, "d": None, "e": "1", "f": 1e-4, "ä": "ü"}
    write_concept(tmp_path / "c.safetensors", make_concept(training=training))
    back = read_concept(tmp_path / "c.safetensors").meta.training
    assert [(k, type(v), v) for k, v in sorted(back.items())] == [
        (k, type(v), v) for k, v in sorted(training.items())
    ]


def test_a_concept_without_tokens_is_allowed(tmp_path):
    concept = dataclasses.replace(make_concept(tokens=()), embeddings={})
    write_concept(tmp_path / "c.safetensors", concept)
    assert read_concept(tmp_path / "c.safetensors").embeddings == {}


def test_rereading_and_writing_gives_the_same_bytes(written, tmp_path):
    write_concept(tmp_path / "again.safetensors", read_concept(written))
    assert (tmp_path / "again.safetensors").read_bytes() == written.read_bytes()


def test_another_process_writes_the_same_bytes_whatever_the_hash_seed(written, tmp_path):
    program = (
        "import sys; from tests.core.concept_examples import make_concept\n"
        "from sbora_diffusion.core.concept import write_concept\n"
        "write_concept(sys.argv[1], make_concept())"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "other")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        check=True,
    )
    assert (tmp_path / "other").read_bytes() == written.read_bytes()


def test_order_of_layers_and_settings_does_not_change_the_bytes(written, tmp_path):
    concept = make_concept(shapes=dict(reversed(SHAPES.items())), base=make_base())
    random_factors = make_concept().layers
    concept = dataclasses.replace(
        concept, layers={name: random_factors[name] for name in concept.layers}
    )
    write_concept(tmp_path / "other", concept)
    assert (tmp_path / "other").read_bytes() == written.read_bytes()


def test_the_safetensors_library_reads_the_file_and_its_metadata(written):
    tensors = safetensors.torch.load_file(written)
    concept = make_concept()
    assert torch.equal(tensors[f"{TO_K}.factor"], concept.layers[TO_K].factor)
    with safe_open(written, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == "<robot>"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "4.0"
    assert str(written.parent) not in json.dumps(metadata)


@pytest.mark.parametrize(("variant", "limit"), [("fa", 0.53), ("fb", 0.55)])
def test_the_file_is_about_half_of_a_lora_of_the_same_rank(tmp_path, variant, limit):
    shapes = {}
    for block in range(9):
        prefix = f"unet.down_blocks.1.attentions.{block}.transformer_blocks.0"
        for attention, inputs in (("attn1", 160), ("attn2", 192)):
            for layer, width in (("to_q", 160), ("to_k", inputs), ("to_v", inputs)):
                shapes[f"{prefix}.{attention}.{layer}"] = (160, width)
    for block in range(4):
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"text_encoder.text_model.encoder.layers.{block}.self_attn.{layer}"] = (192, 192)
    assert len(shapes) == 70
    lora = {}
    for layer, (outputs, inputs) in shapes.items():
        lora[f"{layer}.lora_A.weight"] = torch.zeros(8, inputs)
        lora[f"{layer}.lora_B.weight"] = torch.zeros(outputs, 8)
    training = {f"setting_{k}": "value" for k in range(40)}
    concept = make_concept(variant=variant, rank=8, shapes=shapes, training=training, tokens=())
    concept = dataclasses.replace(concept, embeddings={})
    write_concept(tmp_path / "c.safetensors", concept)
    size = (tmp_path / "c.safetensors").stat().st_size
    assert size <= limit * len(safetensors.torch.save(lora))


def test_an_invalid_concept_is_never_written(tmp_path):
    good = make_concept()
    nan = good.layers[TO_K].factor.clone()
    nan[3, 1] = float("nan")
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteError, match=TO_K):
        write_concept(path, changed(good, factor=nan))
    with pytest.raises(FormatError, match="shape"):
        write_concept(path, changed(good, factor=torch.zeros(4, 16)))
    with pytest.raises(FormatError, match="float64"):
        write_concept(path, changed(good, factor=torch.zeros(16, 4, dtype=torch.float64)))
    with pytest.raises(FormatError, match="magnitude"):
        write_concept(path, changed(good, extras={"magnitude": torch.zeros(16)}))
    with pytest.raises(FormatError, match="bias"):
        write_concept(path, changed(good, extras={"bias": torch.zeros(5)}))
    with pytest.raises(FormatError, match="indices"):
        write_concept(path, changed(good, indices=indices_for(TO_K, 24, 4, 8, 0)))
    with pytest.raises(FormatError, match="1 names"):
        write_concept(
            path, dataclasses.replace(good, layers={**good.layers, "x": good.layers[TO_K]})
        )
    with pytest.raises(CapacityError, match="16 wide"):
        write_concept(path, make_concept_beyond_capacity())
    assert list(tmp_path.iterdir()) == []


def make_concept_beyond_capacity() -> Concept:
    good = make_concept()
    meta = good.meta.model_copy(update={"slot": 4, "start": 16, "stop": 20})
    return dataclasses.replace(good, meta=meta)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../robot"},
        {"name": "a.b"},
        {"name": "robot\n"},
        {"name": "x" * 65},
        {"variant": "lora"},
        {"stop": 5},
        {"start": 4, "stop": 8},
        {"start": -4, "stop": 0},
        {"alpha": 0},
        {"alpha": float("inf")},
        {"allocation_seed": 1 << 64},
        {"family": "SD 1"},
        {"base_name": "/home/me/model"},
        {"base_name": "../model"},
        {"training": {"betas": [0.9, 0.99]}},
        {"training": {"rate": float("nan")}},
        {"tokens": [{"token": "robot", "initializer": "toy"}]},
        {"tokens": [{"token": "<Robot>", "initializer": "toy"}]},
        {"tokens": [{"token": "<a>", "initializer": "toy"}] * 2},
        {"class_noun": "a\x1b[2Jb"},
        {"fingerprint": {"a": "00"}},
        {"unknown": 1},
    ],
)
def test_metadata_refuses_what_it_does_not_know(changes):
    with pytest.raises(ValidationError):
        make_concept(**changes)


def test_only_references_that_mean_something_elsewhere_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_base_name("pocket") == "pocket"
    assert public_base_name("stable-diffusion-v1-5/stable-diffusion-v1-5").endswith("v1-5")
    for local in ("models/mine", str(tmp_path), "./models", "model.safetensors", "~/x", "../a/b"):
        assert public_base_name(local) == ""


def test_a_sealed_concept_has_the_digest_that_its_file_will_have(tmp_path):
    concept = make_concept("robot")
    written = write_concept(tmp_path / "robot.safetensors", concept)
    assert (
        sealed(concept).meta.digest
        == written
        == read_concept(tmp_path / "robot.safetensors").meta.digest
    )
