"""The file of a trained concept of the other methods: strict reading."""

import pytest
import torch

from sbora_diffusion.core.errors import FormatError, NonFiniteError
from sbora_diffusion.core.storage import canonical_json, encode
from sbora_diffusion.diffusion.baselines.adapted import KEY, Adapted, read_adapted, write_adapted
from tests.diffusion.baselines.quick import random_concept


@pytest.mark.parametrize("form", ["words", "low-rank", "magnitude", "full"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_every_form_comes_back_as_it_was_written(thin, form, layerwise, tmp_path):
    concept = random_concept(thin, "one", form, layerwise=layerwise)
    write_adapted(tmp_path / "one", concept)
    back = read_adapted(tmp_path / "one", "lora")
    assert back.meta == concept.meta and torch.equal(back.vectors, concept.vectors)
    assert back.layers.keys() == concept.layers.keys()
    for layer, parts in concept.layers.items():
        assert back.layers[layer].keys() == parts.keys()
        assert all(torch.equal(back.layers[layer][part], parts[part]) for part in parts)


def written(thin, path, change):
    """A file of a LoRA whose tensors and document were changed."""
    concept = random_concept(thin, "one")
    layer = min(concept.layers)
    tensors = {f"{layer}.{part}": t for part, t in concept.layers[layer].items()}
    tensors["token"] = concept.vectors
    document = concept.meta.model_dump(mode="json")
    change(tensors, document, layer)
    path.write_bytes(encode(tensors, {KEY + "lora": canonical_json(document)}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t, d, n: t.pop(f"{n}.up"), "has the parts"),
        (lambda t, d, n: t.update({f"{n}.magnitude": torch.ones(64)}), "has the parts"),
        (lambda t, d, n: t.update({f"{n}.up": torch.ones(64, 4)}), "has the parts"),
        (lambda t, d, n: t.update({"other": torch.ones(1)}), "has the parts"),
        (lambda t, d, n: t.update({"token": torch.ones(64)}), "token has the shape"),
        (lambda t, d, n: d.update(form="words"), "has the parts"),
        (lambda t, d, n: (t.pop(f"{n}.up"), t.pop(f"{n}.down")), "0 layers"),
        (lambda t, d, n: d.update(method="dora"), "says that it is of 'dora'"),
        (lambda t, d, n: d.update(surprise=1), "surprise"),
        (lambda t, d, n: d.pop("token"), "token: Field required"),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(thin, tmp_path, change, problem):
    path = tmp_path / "file"
    written(thin, path, change)
    with pytest.raises(FormatError, match=problem):
        read_adapted(path, "lora")


def test_a_file_with_nan_is_refused(thin, tmp_path):
    written(thin, tmp_path / "file", lambda t, d, n: t["token"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match="token is not finite"):
        read_adapted(tmp_path / "file", "lora")


def test_a_concept_file_of_sbora_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(encode({"a": torch.ones(1)}, {"sbora": "{}"}))
    with pytest.raises(FormatError, match="something else, not of 'lora'"):
        read_adapted(tmp_path / "file", "lora")


def test_merging_refuses_a_layer_that_the_base_has_not(thin):
    from sbora_diffusion.diffusion.baselines.edited import add_up

    concept = random_concept(thin, "one")
    parts = next(iter(concept.layers.values()))
    stranger = Adapted(concept.meta, {"unet.elsewhere": parts}, concept.vectors)
    with pytest.raises(FormatError, match=r"no layer unet\.elsewhere"):
        add_up(thin, [(stranger, 1.0)])
