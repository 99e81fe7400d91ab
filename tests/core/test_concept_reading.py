import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sbora_diffusion.core.concept import (
    read_concept,
    write_concept,
)
from sbora_diffusion.core.errors import (
    FormatError,
    IntegrityError,
    NonFiniteError,
    SboraError,
)
from sbora_diffusion.core.storage import canonical_json, encode
from tests.core.concept_examples import make_concept

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "robot.safetensors"
    write_concept(path, make_concept())
    return path


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def forged(path: Path, edit) -> Path:
    """Rewrite a file after `edit(tensors, document)`, with a digest that is right again."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["sbora"])
    edit(tensors, document)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        kind = {"float32": "F32", "float16": "F16", "int32": "I32"}[str(value.dtype)[6:]]
        shape = ",".join(map(str, value.shape))
        digest.update(f"{key}\0{kind}\0{shape}\0".encode() + value.numpy().tobytes())
    document.pop("digest", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    digest.update(text.encode())
    document["digest"] = digest.hexdigest()
    path.write_bytes(encode(tensors, {"sbora": canonical_json(document)}))
    return path


def _set(key, value):
    return lambda tensors, document: document.__setitem__(key, value)


def _drop(key):
    return lambda tensors, document: tensors.pop(key)


def _put(key, value):
    return lambda tensors, document: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (_drop(f"{TO_K}.indices"), FormatError, "1 missing tensors"),
        (_drop(f"{TO_K}.factor"), FormatError, "1 missing tensors"),
        (_drop("text_encoder.<robot>"), FormatError, "embeddings"),
        (_put(f"{TO_K}.lora_A", torch.zeros(2)), FormatError, "1 unknown tensors"),
        (_put("stray", torch.zeros(2)), FormatError, "unknown"),
        (_put("text_encoder.<other>", torch.zeros(1, 16)), FormatError, "<other>"),
        (_put("text_encoder.<robot>", torch.zeros(16)), FormatError, "embeddings"),
        (_put("text_encoder_2.<robo>", torch.zeros(1, 16)), FormatError, "text_encoder_2"),
        (_put(f"{TO_K}.factor", torch.zeros(16, 5)), FormatError, r"\(out, 4\)"),
        (_put(f"{TO_K}.factor", torch.zeros(16, 4, dtype=torch.int32)), FormatError, "fp32"),
        (_put(f"{TO_K}.factor", torch.full((16, 4), torch.inf)), NonFiniteError, "infinite"),
        (
            _put(f"{TO_K}.indices", int32(0, 1, 2, 99)),
            FormatError,
            "in",
        ),
        (_put(f"{TO_K}.indices", int32(0, 0, 1, 2)), FormatError, "indices of"),
        (
            _put(f"{TO_K}.indices", int32(-1, 0, 1, 2)),
            FormatError,
            "in",
        ),
        (_put(f"{TO_K}.indices", torch.zeros(4)), FormatError, "indices"),
        (_set("format_version", 2), FormatError, "update sbora-diffusion"),
        (_set("rank", 8), FormatError, "rank"),
        (_set("alpha", -1.0), FormatError, "alpha"),
        (_set("allocation_seed", 1), FormatError, "allocation seed 1"),
        (_set("widths", [16, 24, 1 << 20]), FormatError, "widths"),
        (_set("widths", [16, 24]), FormatError, "3 layers"),
        (_set("fingerprint", "ab" * 10), FormatError, "3 layers"),
        (_set("fingerprint", None), FormatError, "fingerprint"),
        (_set("training", {"a": {"b": 1}}), FormatError, "training"),
        (_set("surprise", 1), FormatError, "surprise"),
        (_set("name", "../../etc/passwd"), FormatError, "name"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(written, edit, error, match):
    with pytest.raises(error, match=match) as caught:
        read_concept(forged(written, edit))
    assert "robot.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_forging_nothing_keeps_the_file_readable(written):
    read_concept(forged(written, lambda tensors, document: None))


def test_a_changed_payload_or_document_is_an_integrity_error(written):
    good = written.read_bytes()
    for old, new in (
        (good[-4:], bytes([good[-4] ^ 1]) + good[-3:]),
        (b'\\"class_noun\\":\\"toy\\"', b'\\"class_noun\\":\\"dog\\"'),
    ):
        assert old in good
        written.write_bytes(good.replace(old, new))
        with pytest.raises(IntegrityError, match="damaged"):
            read_concept(written)


def test_a_lora_is_told_apart_from_a_concept_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"unet.a.lora_A.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(FormatError, match="not a concept file"):
        read_concept(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_files_give_typed_errors_or_the_same_concept(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "c.safetensors"
    concept = make_concept()
    write_concept(path, concept)
    good = path.read_bytes()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[position : position + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            content[position:position] = content[position : position + 64]
        if not content:
            return
    path.write_bytes(content)
    try:
        back = read_concept(path)
    except SboraError:
        return
    assert back.meta.model_copy(update={"digest": ""}) == concept.meta
    assert torch.equal(back.layers[TO_K].factor, concept.layers[TO_K].factor)
