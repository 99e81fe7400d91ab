"""Exports give their concepts back in every form; folders of the PEFT tuner become concepts."""

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from sbora_diffusion.core.concept import read_concept, sealed, write_concept
from sbora_diffusion.core.concept_set import rounded_concept
from sbora_diffusion.core.errors import BaseMismatch, FormatError, IntegrityError
from sbora_diffusion.core.renaming import renamed
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.diffusion.formats import write_lora
from sbora_diffusion.diffusion.imports import import_adapter, import_export, is_adapter
from sbora_diffusion.diffusion.lora_files import load_tensors
from tests.diffusion.lora_examples import concept_for
from tests.diffusion.thin_pocket import thin_pocket
from tests.diffusion.thin_sdxl import thin_sdxl

FORMS = ("kohya", "diffusers", "peft")


@pytest.fixture(scope="module")
def base(pocket):
    return thin_pocket(pocket)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pairs(request, base, pocket):
    """FA and FB, with scales that are no power of two."""
    sd = request.param == "sd"
    pipeline, family = (base.pipeline, "pocket") if sd else (thin_sdxl(pocket), "sdxl")
    rows = concept_for(pipeline, "rows", family, variant="fb", rank=3, slot=1, alpha=5.0)
    return [(concept_for(pipeline, "one", family, alpha=3.0), 0.7), (rows, -0.3)]


def same(one, other):
    """The same bytes in a concept file."""
    return one.meta == other.meta and one.meta.digest


@pytest.mark.parametrize("form", FORMS)
def test_an_export_gives_the_same_concepts_and_weights_back(pairs, form, tmp_path):
    for number, concepts in enumerate((pairs, pairs[:1], pairs[1:], [(pairs[0][0], 1.0)])):
        write_lora(tmp_path / str(number), concepts, form=form)
        found = import_export(tmp_path / str(number))
        wanted = sorted(concepts, key=lambda pair: pair[0].meta.digest)
        assert [weight for _, weight in found.concepts] == [weight for _, weight in wanted]
        for (concept, _), (original, _) in zip(found.concepts, wanted, strict=True):
            assert concept.meta == original.meta
            write_concept(tmp_path / "again", concept)
            write_concept(tmp_path / "first", original)
            assert (tmp_path / "again").read_bytes() == (tmp_path / "first").read_bytes()


def test_a_concept_that_is_stored_in_half_precision_comes_back_in_it(pairs, tmp_path):
    half = sealed(rounded_concept(pairs[0][0], torch.float16))
    write_lora(tmp_path / "lora", [(half, 1.0)], form="kohya")
    ((found, _),) = import_export(tmp_path / "lora" / "one.safetensors").concepts
    assert found.meta == half.meta
    assert {stored.factor.dtype for stored in found.layers.values()} == {torch.float16}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_in_half_precision_gives_rounded_concepts(pairs, form, tmp_path):
    """Their digests, and so their order, differ from those of the exported ones."""
    orders = set()
    for number in range(4):
        one = renamed(pairs[0][0], {}, f"one{number}")
        orders.add(rounded_in_half(tmp_path / f"{number}", [(one, 0.7), pairs[1]], form))
    assert False in orders


def rounded_in_half(folder, pairs, form):
    """Export and import in bf16; whether the concepts kept their order."""
    write_lora(folder, pairs, form=form, dtype=torch.bfloat16)
    found = import_export(folder).concepts
    for concept, weight in found:
        (original, expected) = next(p for p in pairs if p[0].meta.name == concept.meta.name)
        assert weight == expected and concept.meta.digest != original.meta.digest
        for layer, stored in original.layers.items():
            assert torch.equal(concept.layers[layer].factor, stored.factor.bfloat16())
    names = [concept.meta.name for concept, _ in sorted(pairs, key=lambda p: p[0].meta.digest)]
    resealed = sorted(found, key=lambda p: p[0].meta.digest)
    return names == [concept.meta.name for concept, _ in resealed]


def test_a_changed_lora_is_not_taken_for_the_concepts(pairs, tmp_path):
    write_lora(tmp_path / "lora", pairs, form="kohya")
    file = tmp_path / "lora" / "one+rows.safetensors"
    tensors, metadata = load_tensors(file)
    for end in ("lora_up.weight", "lora_down.weight"):
        key = next(key for key in tensors if key.endswith(end))
        changed = {**tensors, key: tensors[key] + 1}
        save_file(changed, file, metadata)
        with pytest.raises(IntegrityError, match="changed since the export"):
            import_export(file)
    other = {k.replace("attn2", "attn3"): v for k, v in tensors.items()}
    save_file(other, file, metadata)
    with pytest.raises(FormatError, match="damaged"):
        import_export(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"layers":0', '"layers":7'),
        ('"rank":4', '"rank":"4"'),
        ('"weight":0.7', '"weight":"0.7"'),
        ('"allow_overlap":false,', ""),
        ('"start":0', '"start":1'),
    ],
)
def test_damaged_documents_are_refused(pairs, tmp_path, old, new):
    write_lora(tmp_path / "lora", pairs, form="kohya")
    file = tmp_path / "lora" / "one+rows.safetensors"
    tensors, metadata = load_tensors(file)
    text = metadata["sbora_concepts"]
    assert old in text
    save_file(tensors, file, {**metadata, "sbora_concepts": text.replace(old, new)})
    with pytest.raises((FormatError, IntegrityError)):
        import_export(file)


def test_what_is_missing_is_named(pairs, tmp_path):
    write_lora(tmp_path / "lora", pairs, form="kohya")
    file = tmp_path / "lora" / "one+rows.safetensors"
    (tmp_path / "lora" / "embeddings" / "rows.safetensors").unlink()
    with pytest.raises(FormatError, match=r"rows\.safetensors is missing"):
        import_export(file)
    save_file(load_file(file), file)
    with pytest.raises(FormatError, match=r"no export.*--project"):
        import_export(file)


def adapted(base, folder, **changes):
    """UNet and text encoder with random adapters, saved by PEFT; what each layer stores."""
    prefixes = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
    stored = {}
    for part, prefix in prefixes.items():
        model = copy.deepcopy(getattr(base.pipeline, part))
        settings = {"r": 4, "alpha": 6.0, "variant": "fb", "slot": 2, "name_prefix": prefix}
        config = SboraConfig(target_modules=["to_q", "q_proj"], **(settings | changes))
        peft = get_peft_model(model, config)
        for path, module in peft.base_model.model.named_modules():
            if hasattr(module, "sbora_factor"):
                factor = module.sbora_factor["default"]
                factor.data.normal_()
                stored[prefix + path] = factor.detach().clone()
        peft.save_pretrained(str(folder / part))
    return stored


def test_folders_of_the_peft_tuner_become_one_concept(base, tmp_path):
    stored = adapted(base, tmp_path / "peft")
    assert is_adapter(tmp_path / "peft") and not is_adapter(tmp_path)
    concept = import_adapter(tmp_path / "peft", base, "mug", "cup")
    write_concept(tmp_path / "mug.safetensors", concept)
    read = read_concept(tmp_path / "mug.safetensors")
    assert read.meta == concept.meta
    assert (read.meta.variant, read.meta.rank, read.meta.alpha) == ("fb", 4, 6.0)
    assert (read.meta.start, read.meta.stop, read.meta.class_noun) == (8, 12, "cup")
    assert read.layers.keys() == stored.keys()
    for layer, factor in stored.items():
        assert torch.equal(read.layers[layer].factor, factor)
        assert read.meta.fingerprint[layer] == base.fingerprint[layer]


def test_adapters_that_are_no_concept_are_refused(base, pairs, tmp_path):
    adapted(base, tmp_path / "nameless", name_prefix="")
    with pytest.raises(BaseMismatch, match="name_prefix"):
        import_adapter(tmp_path / "nameless", base, "mug", "cup")
    write_lora(tmp_path / "lora", pairs, form="peft")
    with pytest.raises(FormatError, match="no SBoRA adapter"):
        import_adapter(tmp_path / "lora", base, "mug", "cup")
    adapted(base, tmp_path / "two")
    adapted(base, tmp_path / "other", slot=3)
    (tmp_path / "two" / "unet").rename(tmp_path / "two" / "old")
    (tmp_path / "other" / "unet").rename(tmp_path / "two" / "unet")
    with pytest.raises(FormatError, match="differ in variant, rank or range"):
        import_adapter(tmp_path / "two", base, "mug", "cup")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no PEFT adapter"):
        import_adapter(tmp_path / "empty", base, "mug", "cup")
