"""`load_sbora` in a pipeline of stock diffusers: attached, swapped without compiling, and gone."""

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sbora_diffusion
from sbora_diffusion import load_sbora
from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.concept_set import write_concept_set
from sbora_diffusion.core.errors import BaseMismatch, ConfigError, ConflictError, FormatError
from sbora_diffusion.core.tuner import SboraLinear
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.targets import adaptable
from sbora_diffusion.diffusion.tokens import ENCODERS, text_encoders
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept
from tests.diffusion.lora_examples import concept_for
from tests.diffusion.thin_families import thin_family
from tests.diffusion.thin_pocket import thin_pocket
from tests.diffusion.thin_sd15 import thin_sd15

PROMPT = "a photo of <one>"


@pytest.fixture(scope="module")
def thin(pocket):
    return thin_pocket(pocket)


@pytest.fixture(scope="module")
def clean(pocket):
    """The same weights again, which nothing is attached to."""
    return thin_pocket(pocket)


@pytest.fixture(scope="module")
def files(thin, tmp_path_factory):
    """Two alike but for alpha and token, one in another slot, one of another variant."""
    folder = tmp_path_factory.mktemp("concepts")
    strong_concept(thin, folder, "one", rank=4)
    strong_concept(thin, folder, "other", rank=4, slot=3, alpha=6.0)
    strong_concept(thin, folder, "two", rank=4, slot=1)
    strong_concept(thin, folder, "rows", "fb", rank=4)
    write_concept_set(
        folder / "pair.safetensors",
        [(read_concept(folder / f"{n}.safetensors"), w) for n, w in (("one", 0.5), ("two", 1.0))],
    )
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture
def pipe(thin):
    """Stock diffusers, checked to be as it was when the test ends without concepts."""
    before = snapshot(thin)
    yield thin.pipeline
    for loaded in list(getattr(thin.pipeline, "_sbora_host", Mock(loaded=[])).loaded):
        loaded.unload()
    assert_untouched(thin, before)


def drawn(pipe, prompt=PROMPT):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
    return pipe(prompt, **options).images


def merged(clean, files, weights, prompt=PROMPT):
    """What the folded model draws; `weights` by name."""
    model = Merged(clean, [(read_concept(files[name]), w) for name, w in weights.items()])
    try:
        return drawn(clean.pipeline, prompt)
    finally:
        model.restore()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_loaded_concept_draws_what_the_folded_model_draws_and_leaves_no_trace(pipe, clean, files):
    plain = drawn(pipe)
    loaded = load_sbora(pipe, files["one"])
    live = drawn(pipe)
    loaded.unload()
    assert not hasattr(pipe, "_sbora_host")
    assert torch.equal(drawn(pipe), plain) and (live - plain).abs().max() > 1e-2
    close(live, merged(clean, files, {"one": 1.0}))


def test_diffusers_own_loader_refuses_concept_files_and_changes_nothing(pipe, files):
    for hotswap in (False, True):
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            name = files["one"].name
            pipe.load_lora_weights(files["one"].parent, weight_name=name, hotswap=hotswap)
    assert not any(isinstance(module, SboraLinear) for module in pipe.unet.modules())
    load_sbora(pipe, files["one"]).unload()


def test_swapping_and_weighing_draw_what_a_fresh_pipeline_draws(pipe, clean, files):
    loaded = load_sbora(pipe, files["one"], weight=0.5)
    close(drawn(pipe), merged(clean, files, {"one": 0.5}))
    loaded.swap(files["other"])
    assert [concept.meta.name for concept, _ in loaded.concepts] == ["other"]
    close(drawn(pipe, "a <other>"), merged(clean, files, {"other": 1.0}, "a <other>"))
    loaded.set_weight(-0.4)
    close(drawn(pipe, "a <other>"), merged(clean, files, {"other": -0.4}, "a <other>"))
    loaded.swap(files["one"])
    loaded.unload()


def test_several_files_and_sets_live_side_by_side(pipe, clean, files):
    pair = load_sbora(pipe, files["pair"], weight=0.8)
    rows = load_sbora(pipe, files["rows"], weight=0.3)
    weights = {"one": 0.4, "two": 0.8, "rows": 0.3}
    close(drawn(pipe), merged(clean, files, weights))
    pair.unload()
    close(drawn(pipe), merged(clean, files, {"rows": 0.3}))
    rows.unload()


def test_a_swap_compiles_nothing(pipe, files):
    torch._dynamo.reset()
    counters = [CompileCounterWithBackend("eager") for _ in range(2)]
    loaded = load_sbora(pipe, files["one"])
    models = (pipe.unet.mid_block, pipe.text_encoder)  # the whole UNet takes ten times as long
    try:
        for model, counter in zip(models, counters, strict=True):
            model._compiled_call_impl = torch.compile(model._call_impl, backend=counter)
        before = drawn(pipe)
        compiled = [counter.frame_count for counter in counters]
        assert all(compiled)
        loaded.swap(files["other"])
        after = drawn(pipe)
        loaded.set_weight(0.3)
        drawn(pipe)
        loaded.swap(files["two"], weight=2.0)
        drawn(pipe)
        assert [counter.frame_count for counter in counters] == compiled
        assert not torch.equal(before, after)
    finally:
        for model in models:
            model._compiled_call_impl = None
        loaded.unload()
        torch._dynamo.reset()


def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, pocket, files, tmp_path):
    loaded = load_sbora(pipe, files["one"])
    before = drawn(pipe)
    with pytest.raises(ConflictError, match="'one' is used by more than one concept"):
        load_sbora(pipe, files["one"])
    strong_concept(pocket, tmp_path, "foreign", rank=4)
    with pytest.raises(BaseMismatch):
        load_sbora(pipe, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError):
        load_sbora(pipe, tmp_path / "missing.safetensors")
    with pytest.raises(ConfigError, match="finite"):
        load_sbora(pipe, files["two"], weight=float("nan"))
    with pytest.raises(ConfigError, match="another variant, rank"):
        loaded.swap(files["rows"])
    with pytest.raises(ConfigError, match="the file has 2"):
        loaded.swap(files["pair"])
    with pytest.raises(ConfigError, match="finite"):
        loaded.set_weight(float("inf"))
    two = load_sbora(pipe, files["two"], weight=0.0)
    with pytest.raises(ConflictError):
        two.swap(files["one"])
    two.unload()
    close(drawn(pipe), before)
    loaded.unload()


def test_importing_the_package_stays_light():
    program = "import sys, sbora_diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sbora_diffusion.nothing


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_texts_with_placeholders_are_pooled_at_their_end(pocket, family, tmp_path):
    """Configurations with `eos_token_id == 2` pool at the highest number: the placeholder's."""
    base = thin_sd15(pocket) if family == "sd1" else thin_family(family, pocket)
    assert base.pipeline.text_encoder.config.eos_token_id == 2
    write_concept(tmp_path / "mug.safetensors", concept_for(base.pipeline, "mug", family))
    loaded = load_sbora(base.pipeline, tmp_path / "mug.safetensors")
    for name, encoder in text_encoders(base.pipeline).items():
        tokenizer = getattr(base.pipeline, ENCODERS[name])
        if not hasattr(encoder.config, "projection_dim"):  # T5 pools nothing
            continue
        ids = tokenizer(["a <mug> <mug>_1 photo"], padding="max_length", return_tensors="pt")
        ids, end = ids.input_ids, tokenizer.eos_token_id
        found = encoder(ids, output_hidden_states=True)
        inner = getattr(encoder, "text_model", encoder)
        states = inner.final_layer_norm(found.hidden_states[-1])
        expected = states[0, ids[0].tolist().index(end)]
        if hasattr(encoder, "text_projection"):
            torch.testing.assert_close(found.text_embeds[0], encoder.text_projection(expected))
        else:
            torch.testing.assert_close(found.pooler_output[0], expected)
        assert ids.max() > end
    loaded.unload()


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_every_text_encoder_and_the_denoiser_get_the_concept(pocket, family, tmp_path):
    base = thin_family(family, pocket)
    concept = concept_for(base.pipeline, "mug", family)
    write_concept(tmp_path / "mug.safetensors", concept)
    before = snapshot_of(base.pipeline)
    loaded = load_sbora(base.pipeline, tmp_path / "mug.safetensors")
    adapted = {name for name, _ in adaptable(base.pipeline)}
    assert {layer.partition(".")[0] for layer in concept.layers} == adapted
    for name, model in adaptable(base.pipeline):
        count = sum(isinstance(module, SboraLinear) for module in model.modules())
        assert count == sum(layer.startswith(f"{name}.") for layer in concept.layers)
    loaded.unload()
    after = snapshot_of(base.pipeline)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def snapshot_of(pipeline):
    return {
        f"{name}.{key}": value.clone()
        for name, model in adaptable(pipeline)
        for key, value in model.state_dict().items()
    }
