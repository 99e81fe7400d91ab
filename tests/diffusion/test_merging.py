"""Folding is exact, order-free and leaves nothing behind that it should not."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import BaseMismatch, ConflictError, NonFiniteError, ResourceError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept, strong_concepts

pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture(scope="module")
def original(pocket):
    return snapshot(pocket)


@pytest.fixture(autouse=True)
def base_is_given_back(pocket, original):
    yield
    assert_untouched(pocket, original)


@pytest.fixture(scope="module")
def strong(pocket, tmp_path_factory):
    return strong_concepts(pocket, tmp_path_factory.mktemp("strong"))


def merge_and_save(pocket, folder: Path, concepts, dtype=torch.float32, allow_overlap=False):
    """The model folder of a merge; the base is restored."""
    merged = Merged(pocket, concepts, allow_overlap)
    try:
        merged.save(folder, dtype)
    finally:
        merged.restore()
    return folder


@pytest.fixture(scope="module")
def folder(pocket, strong, tmp_path_factory):
    """Concepts `one` and `two` in one model folder, fp32."""
    target = tmp_path_factory.mktemp("merged") / "model"
    return merge_and_save(pocket, target, [(strong["one"], 1.0), (strong["two"], 0.7)])


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def stock(folder: Path) -> Base:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return Base(str(folder), pipeline, "pocket")


def test_outside_the_owned_rows_and_columns_every_parameter_is_the_bases(pocket, original, strong):
    chosen = ("one", "two", "rows")
    owned = {id(layer.weight): name for name, layer in target_layers(pocket.pipeline).items()}
    merged = Merged(pocket, [(strong[name], 1.0) for name in chosen])
    try:
        for part in ("unet", "text_encoder", "vae"):
            for key, weight in getattr(pocket.pipeline, part).named_parameters():
                before, now = original[f"{part}.{key}"], weight.detach()
                if "token_embedding" in key:
                    assert torch.equal(now[: len(before)], before) and len(now) == len(before) + 6
                elif id(weight) in owned:
                    free = outside([strong[n] for n in chosen], owned[id(weight)], before.shape)
                    assert torch.equal(now[free], before[free])
                    assert (now[~free] != before[~free]).float().mean() > 0.99
                else:
                    assert torch.equal(now, before)
    finally:
        merged.restore()


def outside(concepts, layer: str, shape) -> torch.Tensor:
    free = torch.ones(shape, dtype=torch.bool)
    for concept in concepts:
        indices = concept.layers[layer].indices.long()
        if concept.meta.variant == "fa":
            free[:, indices] = False
        else:
            free[indices] = False
    return free


@pytest.mark.parametrize(
    ("names", "overlap"),
    [(("one", "two"), False), (("two", "rows", "one"), False), (("one", "double"), True)],
    ids=["two of one variant", "both variants", "overlapping"],
)
def test_either_order_gives_the_same_bytes_of_every_file(pocket, strong, tmp_path, names, overlap):
    concepts = [(strong[name], 0.5 + k / 4) for k, name in enumerate(names)]
    first = merge_and_save(pocket, tmp_path / "a", concepts, allow_overlap=overlap)
    second = merge_and_save(pocket, tmp_path / "b", concepts[::-1], allow_overlap=overlap)
    assert hashes(first) == hashes(second) and len(hashes(first)) >= 10
    assert any("tokenizer" in name for name in hashes(first))


def test_overlapping_concepts_are_refused_and_nothing_changes(pocket, original, strong):
    with pytest.raises(ConflictError, match=r"share 576 indices in 72 layers.*--allow-overlap"):
        Merged(pocket, [(strong["one"], 1.0), (strong["double"], 1.0)])
    assert_untouched(pocket, original)


def test_restore_gives_the_base_back_bit_for_bit(pocket, original, strong):
    prompt = ["a photo of a bear"]
    before = draw_latents(pocket, prompt, [0], 1)
    merged = Merged(pocket, [(strong["one"], 1.0), (strong["rows"], -0.3)])
    assert not torch.equal(draw_latents(pocket, prompt, [0], 1), before)
    merged.restore()
    assert_untouched(pocket, original)
    assert torch.equal(draw_latents(pocket, prompt, [0], 1), before)


def test_live_adapters_and_the_folded_model_agree_after_twenty_steps(pocket, strong):
    """Within 1e-4 in fp32 latents, for concepts of the size that training gives."""
    prompt, concepts = ["a photo of <one> and <two>"], [(strong["one"], 0.3), (strong["two"], 0.3)]
    plain = draw_latents(pocket, prompt, [0], 20)
    live = ConceptPipeline(pocket)
    for concept, weight in concepts:
        live.add(concept, weight)
    adapted = draw_latents(pocket, prompt, [0], 20)
    for concept, _ in concepts:
        live.remove(concept.meta.name)
    merged = Merged(pocket, concepts)
    try:
        folded = draw_latents(pocket, prompt, [0], 20)
    finally:
        merged.restore()
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted, folded, rtol=0, atol=1e-4)


def test_the_saved_folder_loads_in_stock_diffusers_and_draws_the_same(pocket, strong, folder):
    prompt = ["a photo of <one> and <two>"]
    merged = Merged(pocket, [(strong["one"], 1.0), (strong["two"], 0.7)])
    try:
        expected = draw_latents(pocket, prompt, [0], 2)
    finally:
        merged.restore()
    assert torch.equal(draw_latents(stock(folder), prompt, [0], 2), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saving_in_half_precision_rounds_the_fp32_folder_once(
    pocket, strong, folder, tmp_path, dtype
):
    concepts = [(strong["one"], 1.0), (strong["two"], 0.7)]
    half, full = tensors(merge_and_save(pocket, tmp_path / "m", concepts, dtype)), tensors(folder)
    assert half.keys() == full.keys()
    for key, value in full.items():
        expected = value.to(dtype) if value.is_floating_point() else value
        assert half[key].dtype == expected.dtype and torch.equal(half[key], expected)
    assert draw_latents(stock(tmp_path / "m"), ["a <one>"], [0], 1).isfinite().all()


def test_no_file_names_a_path_of_this_machine(folder):
    paths = [
        str(Path.cwd()),
        str(Path.home()) + "/",
        str(folder),
        "/site-packages",
        "_name_or_path",
    ]
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert [path for path in paths if path.encode() in content] == [], file


def test_the_record_names_what_was_merged(folder, strong):
    record = json.loads((folder / "sbora.json").read_text())
    found = {c["name"]: (c["weight"], c["digest"], c["tokens"]) for c in record["concepts"]}
    assert found == {
        "one": (1.0, strong["one"].meta.digest, ["<one>"]),
        "two": (0.7, strong["two"].meta.digest, ["<two>"]),
    }
    assert (record["base"], record["dtype"], record["rounded_base"]) == ("pocket", "float32", False)


def test_a_save_below_a_regular_file_leaves_nothing_behind(pocket, strong, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        merge_and_save(pocket, tmp_path / "file" / "model", [(strong["one"], 1.0)])
    assert hashes(tmp_path).keys() == {"file"}


def test_a_folder_that_is_not_empty_and_a_file_are_not_overwritten(pocket, strong, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for target in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(ConflictError, match="exists and is not empty"):
            merge_and_save(pocket, target, [(strong["one"], 1.0)])
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error"), KeyboardInterrupt()],
    ids=repr,
)
def test_a_save_that_stops_in_the_middle_leaves_nothing_behind(
    pocket, strong, tmp_path, monkeypatch, error
):
    def stop(*_):
        raise error

    monkeypatch.setattr("sbora_diffusion.diffusion.merging._forget_paths", stop)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ResourceError
    with pytest.raises(expected):
        merge_and_save(pocket, tmp_path / "model", [(strong["one"], 1.0)])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(pocket, strong, tmp_path):
    (tmp_path / "model").mkdir()
    merge_and_save(pocket, tmp_path / "model", [(strong["one"], 1.0)])
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_a_concept_of_another_base_is_refused(pocket, strong, tmp_path):
    other = {**pocket.fingerprint, min(pocket.fingerprint): "0" * 48}
    with pytest.raises(BaseMismatch):
        Merged(pocket, [(strong_concept(pocket, tmp_path, "alien", fingerprint=other), 1.0)])


def test_a_fold_that_overflows_is_refused_and_nothing_changes(pocket, original, strong):
    with pytest.raises(NonFiniteError):
        Merged(pocket, [(strong["one"], 1e39)])
    assert_untouched(pocket, original)


def test_a_folded_base_is_not_folded_again(pocket, tiny_concepts):
    concept = read_concept(tiny_concepts["plushbear"])
    merged = Merged(pocket, [(concept, 1.0)])
    try:
        with pytest.raises(ConflictError, match="folded"):
            Merged(pocket, [(concept, 1.0)])
    finally:
        merged.restore()
    Merged(pocket, [(concept, 1.0)]).restore()
