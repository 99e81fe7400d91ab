"""The concept-set file: whole, deterministic, refused when anything in it is wrong."""

import pytest
import torch

from sbora_diffusion.core.concept import read_concept, sealed, write_concept
from sbora_diffusion.core.concept_set import (
    KEY,
    read_concept_set,
    read_concepts,
    read_member,
    rounded_concept,
    write_concept_set,
)
from sbora_diffusion.core.errors import (
    ConfigError,
    ConflictError,
    FormatError,
    IntegrityError,
    NonFiniteError,
    SboraError,
)
from sbora_diffusion.core.storage import canonical_json, decode, encode, strict_json
from tests.core.concept_examples import make_concept


@pytest.fixture(scope="module")
def concepts():
    kinds = [("robot", "fa", 0), ("fox", "fa", 1), ("row", "fb", 0)]
    return [(sealed(make_concept(n, v, slot=s)), 0.5 + s) for n, v, s in kinds]


@pytest.fixture
def written(concepts, tmp_path):
    write_concept_set(tmp_path / "set.safetensors", concepts)
    return tmp_path / "set.safetensors"


def same(first, second) -> bool:
    tensors = [(first.layers[name].factor, second.layers[name].factor) for name in first.layers] + [
        (first.embeddings[key], second.embeddings[key]) for key in first.embeddings
    ]
    return first.meta == second.meta and all(torch.equal(a, b) for a, b in tensors)


def test_reading_gives_back_every_concept_with_its_weight(written, concepts):
    found = read_concept_set(written)
    expected = sorted(concepts, key=lambda pair: pair[0].meta.digest)
    assert [weight for _, weight in found.concepts] == [weight for _, weight in expected]
    assert all(same(a, b) for (a, _), (b, _) in zip(found.concepts, expected, strict=True))
    assert found.allow_overlap is False and len(found.digest) == 64


def test_the_bytes_do_not_depend_on_the_order(written, concepts, tmp_path):
    write_concept_set(tmp_path / "other.safetensors", concepts[::-1])
    assert (tmp_path / "other.safetensors").read_bytes() == written.read_bytes()


def test_a_concept_file_reads_as_a_set_of_one_and_is_not_a_set_file(written, concepts, tmp_path):
    path = tmp_path / "one.safetensors"
    write_concept(path, concepts[0][0])
    ((found, weight),) = read_concepts(path).concepts
    assert same(found, concepts[0][0]) and weight == 1.0
    assert len(read_concepts(written).concepts) == 3
    with pytest.raises(FormatError, match="not a concept set"):
        read_concept_set(path)
    with pytest.raises(FormatError, match="not a concept file"):
        read_concept(written)


def test_a_member_is_found_by_its_name(written, concepts):
    assert same(read_member(written, "fox"), concepts[1][0])
    with pytest.raises(ConfigError, match=r"no concept 'cat'.*fox"):
        read_member(written, "cat")


def test_overlap_is_refused_unless_allowed_and_then_recorded(concepts, tmp_path):
    pairs = [concepts[0], (sealed(make_concept("twin")), 1.0)]
    with pytest.raises(ConflictError, match=r"share 12 indices in 3 layers.*--allow-overlap"):
        write_concept_set(tmp_path / "s.safetensors", pairs)
    assert list(tmp_path.iterdir()) == []
    write_concept_set(tmp_path / "s.safetensors", pairs, allow_overlap=True)
    assert read_concept_set(tmp_path / "s.safetensors").allow_overlap is True


def test_what_cannot_be_a_set_is_not_written(concepts, tmp_path):
    path = tmp_path / "s.safetensors"
    for wrong, match in (([], "at least one"), ([(concepts[0][0], float("inf"))], "finite")):
        with pytest.raises(ConfigError, match=match):
            write_concept_set(path, wrong)
    with pytest.raises(ConflictError, match="'robot'"):
        write_concept_set(path, [concepts[0], concepts[0]])
    assert not path.exists()


def forged(path, edit) -> None:
    """Write the set again after `edit(tensors, document)`, as a forger would, digests kept."""
    tensors, metadata = decode(path)
    document = strict_json(metadata[KEY])
    edit(tensors, document)
    path.write_bytes(encode(tensors, {KEY: canonical_json(document)}))


def _change_weight(tensors, document):
    document["concepts"][0]["weight"] = 0.25


def _change_factor(tensors, document):
    key = next(key for key in tensors if key.endswith(".factor"))
    tensors[key][0, 0] += 1


def _swap(tensors, document):
    document["concepts"].reverse()


def _drop_tensor(tensors, document):
    del tensors[next(key for key in tensors if key.endswith(".factor"))]


def _stray_tensor(tensors, document):
    tensors["stranger:x.factor"] = torch.zeros(2)


def _integer_weight(tensors, document):
    document["concepts"][0]["weight"] = 1


def _drop_concept(tensors, document):
    del document["concepts"][0]


def _allow(tensors, document):
    document["allow_overlap"] = "yes"


def _version(tensors, document):
    document["format_version"] = 2


def _list_of_nothing(tensors, document):
    document["concepts"] = []


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (_change_weight, IntegrityError),
        (_change_factor, IntegrityError),
        (_swap, FormatError),
        (_drop_tensor, IntegrityError),
        (_stray_tensor, FormatError),
        (_integer_weight, FormatError),
        (_drop_concept, IntegrityError),
        (_allow, FormatError),
        (_version, FormatError),
        (_list_of_nothing, FormatError),
    ],
    ids=lambda value: value.__name__,
)
def test_a_forged_set_is_refused_and_the_file_named(written, edit, error):
    forged(written, lambda tensors, document: None)
    assert read_concept_set(written)  # the forger's tool itself changes nothing
    forged(written, edit)
    with pytest.raises(error, match=r"set\.safetensors"):
        read_concept_set(written)


def test_every_flipped_byte_of_the_header_and_many_of_the_data_are_refused(written):
    data = written.read_bytes()
    for place in [*range(0, 2000, 61), *range(2000, len(data), 997)]:
        written.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(SboraError):
            read_concept_set(written)


def test_rounding_narrows_what_is_wider_and_fp32_keeps_the_digest(concepts):
    concept = concepts[0][0]
    assert sealed(rounded_concept(concept, torch.float32)).meta.digest == concept.meta.digest
    half = rounded_concept(concept, torch.float16)
    assert {stored.factor.dtype for stored in half.layers.values()} == {torch.float16}
    assert rounded_concept(half, torch.bfloat16).layers.keys() == half.layers.keys()
    wide = rounded_concept(half, torch.float32)
    assert {stored.factor.dtype for stored in wide.layers.values()} == {torch.float16}


def test_a_number_that_overflows_the_narrow_type_is_refused(concepts, tmp_path):
    concept = make_concept("loud")
    layer = min(concept.layers)
    concept.layers[layer].factor[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match=layer):
        write_concept_set(
            tmp_path / "s.safetensors", [(rounded_concept(concept, torch.float16), 1.0)]
        )
