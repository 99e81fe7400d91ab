"""Exports in the real shapes of SD 1.5 and SDXL, with random weights; on a GPU if there is one."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbora_diffusion.diffusion.formats import write_lora
from sbora_diffusion.diffusion.imports import import_export
from sbora_diffusion.diffusion.untrained import sd15_unet, sdxl_unet
from tests.diffusion.lora_examples import concept_for, folded, loaded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = 49408


def clip(kind, width: int, layers: int):
    return kind(
        CLIPTextConfig(
            vocab_size=WORDS,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
    )


def pipeline_of(family: str, pocket):
    """Words and autoencoder are the pocket's: no export reads them."""
    with torch.device(DEVICE):
        models = {"text_encoder": clip(CLIPTextModel, 768, 12)}
        if family == "sdxl":
            models["text_encoder_2"] = clip(CLIPTextModelWithProjection, 1280, 32)
        models["unet"] = sd15_unet() if family == "sd1" else sdxl_unet()
    for model in models.values():
        model.requires_grad_(False).eval()
    parts = pocket.pipeline.components
    kept = {name: copy.deepcopy(parts[name]) for name in ("vae", "tokenizer", "scheduler")}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**models, **kept, tokenizer_2=kept["tokenizer"])
    return StableDiffusionPipeline(
        **models, **kept, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_kohyas_lora_fuses_into_the_folded_model_and_comes_back_as_it_was(pocket, family, tmp_path):
    if family == "sdxl" and DEVICE == "cpu":
        pytest.skip("SDXL's weights, several times, are too much for a CPU's memory")
    pipeline = pipeline_of(family, pocket)
    pairs = [
        (concept_for(pipeline, "one", family, rank=8, alpha=8.0), 1.0),
        (concept_for(pipeline, "two", family, rank=8, slot=1, alpha=4.0), 0.7),
    ]
    write_lora(tmp_path / "lora", pairs, form="kohya")
    expected = folded(pipeline, pairs)
    found = loaded(pipeline, tmp_path / "lora", "one+two.safetensors")
    assert len(expected) == {"sd1": 176, "sdxl": 736}[family]
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    again = {concept.meta.digest: w for concept, w in import_export(tmp_path / "lora").concepts}
    assert again == {concept.meta.digest: weight for concept, weight in pairs}
