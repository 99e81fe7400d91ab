"""Every family: trained, kept in a file, attached, merged, removed, saved, drawn with."""

import json

import pytest
import torch

from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.errors import ConfigError, FormatError
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.pipeline import (
    ConceptPipeline,
    decode,
    draw_latents,
    encode,
    told_texts,
)
from sbora_diffusion.diffusion.regions import Regions
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.texts import Texts
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, text_encoders, word_vectors
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.identity import environment
from tests.conftest import CONCEPTS
from tests.diffusion.thin_families import NAMES, thin_family

TINY = TrainConfig(
    steps=3, copies=1, batch_size=1, preservation=0.0, rank=4, vectors=2, rate_unet=0.1,
    rate_text_encoder=0.1, rate_tokens=0.1,
)  # fmt: skip
PROMPT = "a photo of <plushbear>"
LAYERS = {"sd2": 40, "sdxl": 48, "sd3": 35}
ENCODERS = {"sd2": 1, "sdxl": 2, "sd3": 3}


@pytest.fixture(scope="module", params=NAMES)
def base(request, pocket) -> Base:
    return thin_family(request.param, pocket)


def parts(base: Base) -> dict[str, torch.Tensor]:
    models = {n: m for n, m in base.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}


def assert_untouched(base: Base, before: dict[str, torch.Tensor]) -> None:
    now = parts(base)
    assert now.keys() == before.keys()
    assert [key for key in now if not torch.equal(now[key], before[key])] == []


def drawn(base: Base, prompt: str = PROMPT) -> torch.Tensor:
    return draw_latents(base, [prompt], [0], steps=2)


@pytest.fixture(scope="module")
def concept(base, tmp_path_factory):
    """Trained for a few steps, written and read back; the base is as it was."""
    before = parts(base)
    training = ConceptTraining(base, read_subject(CONCEPTS / "plushbear"), TINY, 0)
    try:
        assert not training.lesson.initial.keys() ^ text_encoders(base.pipeline).keys()
        list(training.steps())
        assert training.folded.obstacles == {}
        found = training.concept()
    finally:
        training.close()
    assert_untouched(base, before)
    path = tmp_path_factory.mktemp("family") / "plushbear.safetensors"
    write_concept(path, found)
    return read_concept(path)


def test_a_concept_changes_every_model_and_has_words_for_every_text_encoder(base, concept):
    assert concept.meta.family == base.family
    assert len(concept.layers) == len(target_layers(base.pipeline)) == LAYERS[base.family]
    names = {name.partition(".")[0] for name in concept.embeddings}
    assert names == set(text_encoders(base.pipeline)) and len(names) == ENCODERS[base.family]
    changed = {n.partition(".")[0] for n, x in concept.layers.items() if x.factor.count_nonzero()}
    assert changed == {base.kind.denoiser, *(names - {"text_encoder_3"})}


def test_attached_and_merged_concepts_draw_alike_and_leave_nothing_behind(base, concept):
    before, plain = parts(base), drawn(base, "a photo of a bear")
    live = ConceptPipeline(base)
    live.add(concept)
    attached = drawn(base)
    live.remove("plushbear")
    assert_untouched(base, before)
    merged = Merged(base, [(concept, 1.0)])
    folded = drawn(base)
    merged.restore()
    assert_untouched(base, before)
    assert torch.equal(drawn(base, "a photo of a bear"), plain)
    scale = folded.abs().max()
    assert (attached - folded).abs().max() < 1e-4 * scale
    assert (folded - plain).abs().max() > 1e-3 * scale


def test_what_a_checkpoint_notes_is_known_of_every_family(base):
    assert environment(base)["dtype"] == "float32"


def test_a_merged_model_is_a_folder_that_is_read_as_its_family_and_draws_the_same(
    base, concept, tmp_path
):
    merged = Merged(base, [(concept, 1.0)])
    try:
        expected = drawn(base)
        merged.save(tmp_path / "merged")
    finally:
        merged.restore()
    again = load_base(str(tmp_path / "merged"), "cpu")
    assert again.family == base.family
    assert torch.equal(drawn(again), expected)


def test_before_the_first_step_a_placeholder_is_its_class_noun(base):
    noun, prompt = "teddy bear", "a photo of {} on a table"
    expected = drawn(base, prompt.format(noun))
    vectors = {
        f"{encoder}.<new>": word_vectors(base.pipeline, noun, encoder)
        for encoder in text_encoders(base.pipeline)
    }
    tokens = PlaceholderTokens(base.pipeline)
    tokens.set(vectors)
    try:
        assert torch.equal(drawn(base, prompt.format("<new>")), expected)
    finally:
        tokens.set({})


def told(base: Base, texts: Texts, prompt: str):
    ids = texts.ids(prompt)[None]
    with torch.no_grad():
        return texts.told(text_encoders(base.pipeline), ids, torch.float32)


def test_training_tells_the_denoiser_what_drawing_tells_it(base, concept):
    """Whether texts are read at each step or once; the pooled output is that of the text's end."""
    tokens = PlaceholderTokens(base.pipeline)
    tokens.set(concept.embeddings)
    try:
        texts = told_texts(base, "prompt", [PROMPT])
        options = {"device": "cpu", "num_images_per_prompt": 1}
        encoded = base.pipeline.encode_prompt(**texts, **options, do_classifier_free_guidance=False)
        for kept in ((), text_encoders(base.pipeline)):
            reader = Texts(base, kept)
            reader.keep(["another", PROMPT])
            found = told(base, reader, PROMPT)
            torch.testing.assert_close(found.states, encoded[0], rtol=0, atol=1e-6)
            if found.pooled is not None:
                torch.testing.assert_close(found.pooled, encoded[2], rtol=0, atol=1e-6)
    finally:
        tokens.set({})


def test_texts_are_read_once_where_no_text_encoder_is_trained(base):
    config = TINY.model_copy(update={"rate_tokens": 0.0, "rate_text_encoder": 0.0, "steps": 1})
    training = ConceptTraining(base, read_subject(CONCEPTS / "plushbear"), config, 0)
    try:
        assert training.models.keys() == {base.kind.denoiser}
        list(training.steps())
        found = training.concept()
    finally:
        training.close()
    names = {n.partition(".")[0] for n, x in found.layers.items() if x.factor.count_nonzero()}
    assert names == {base.kind.denoiser}
    start = word_vectors(base.pipeline, "teddy bear")
    assert torch.equal(found.embeddings["text_encoder.<plushbear>"], start)


def test_latents_that_are_decoded_are_the_pictures_that_were_encoded(base):
    """Up to what the autoencoder loses; a shift that is left out on one side shows."""
    vae, pixels = base.pipeline.vae, torch.zeros(1, 3, 32, 32)
    latents = encode(base, pixels)
    with torch.no_grad():
        plain = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    expected = base.pipeline.image_processor.postprocess(plain, output_type="pil")
    assert decode(base, latents)[0].tobytes() == expected[0].tobytes()


def test_checkpointing_and_half_precision_train_and_end_with_the_training(base):
    """Also after a training in whole precision: accelerate prepares a model once unless told."""
    layers, seen = target_layers(base.pipeline), set()
    config = TINY.model_copy(
        update={"gradient_checkpointing": True, "mixed_precision": "bf16", "steps": 1}
    )
    before, plain = parts(base), drawn(base, "a photo of a bear")
    whole = TINY.model_copy(update={"steps": 1})
    for recipe, dtype in ((whole, torch.float32), (config, torch.bfloat16)):
        training = ConceptTraining(base, read_subject(CONCEPTS / "plushbear"), recipe, 0)
        hooks = [
            layer.register_forward_hook(lambda *call: seen.add(call[2].dtype))
            for layer in layers.values()
        ]
        try:
            (record,) = training.steps()
        finally:
            training.close()
            for hook in hooks:
                hook.remove()
        assert record.loss > 0 and seen == {dtype}
        seen.clear()
    assert torch.equal(drawn(base, "a photo of a bear"), plain)
    assert_untouched(base, before)


@pytest.fixture(scope="module")
def flow(pocket) -> Base:
    return thin_family("sd3", pocket, with_t5=False)


def test_stable_diffusion_3_works_without_t5_also_from_a_folder(flow, tmp_path):
    texts = Texts(flow)
    expected = flow.pipeline.encode_prompt("a photo", None, None)
    found = told(flow, texts, "a photo")
    torch.testing.assert_close(found.states, expected[0], rtol=0, atol=1e-6)
    flow.pipeline.save_pretrained(tmp_path / "model")
    again = load_base(str(tmp_path / "model"), "cpu")
    assert again.pipeline.text_encoder_3 is None
    assert torch.equal(drawn(again, "a photo"), drawn(flow, "a photo"))


def test_regions_need_cross_attention_and_say_so_in_a_line(flow):
    said = "regions cannot work with a base of family sd3, which .*; draw without regions"
    with pytest.raises(ConfigError, match=said) as caught:
        Regions(ConceptPipeline(flow))
    assert "\n" not in str(caught.value)


def test_weights_by_signal_to_noise_are_refused_for_a_flow(flow):
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        flow.kind.objective(flow.pipeline.scheduler.config, 0.0, 5.0)


def test_a_folder_with_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(FormatError, match="is a FluxPipeline, which no known family has; known"):
        load_base(str(tmp_path), "cpu")
