"""What folded training keeps for the backward pass, beside what the frozen model keeps."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model

from sbora_diffusion.bench.memory import peak_bytes
from sbora_diffusion.core.recalled import plain_norms, recalled_norms
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.core.tuner.folded_training import folded_training

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, PIXELS, WORDS, WIDTH = 4, 16, 7, 32


def unet() -> UNet2DConditionModel:
    """Two blocks with attention and one in the middle, as in Stable Diffusion."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        )
    return model.requires_grad_(False)


def kept_bytes(variant: str = "", recall: bool = False) -> int:
    """By one step, in which the model's inputs get gradients too."""
    model, g = unet(), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, PIXELS, PIXELS, generator=g).requires_grad_()
    states = torch.randn(1, WORDS, WIDTH, generator=g).requires_grad_()
    with ExitStack() as stack:
        if variant:
            config = SboraConfig(r=RANK, variant=variant, target_modules=TARGETS)
            get_peft_model(model, config)
            layers = {n: m for n, m in model.named_modules() if n.endswith(tuple(TARGETS))}
            training = stack.enter_context(folded_training(layers, "default"))
            assert len(training.layers) == 32 and not training.obstacles
        if recall:
            stack.enter_context(recalled_norms(plain_norms(model)))

        def step() -> None:
            model(latents, torch.tensor([3]), states).sample.square().sum().backward()

        return peak_bytes(step, model, "cpu")


@pytest.fixture(scope="module")
def floor():
    return kept_bytes()


def test_fb_keeps_next_to_nothing_once_layer_norms_are_recalled(floor):
    assert kept_bytes("fb") > 1.03 * floor
    assert floor < kept_bytes("fb", recall=True) < 1.001 * floor


def test_fa_keeps_its_columns_alone(floor):
    # Of 32 layers in 4 blocks: norm outputs, attention outputs and words, rank columns of each.
    tokens = 3 * PIXELS**2 + PIXELS**2 // 4
    columns = 4 * RANK * (6 * tokens + 2 * 4 * WORDS)
    assert kept_bytes("fa") - floor == pytest.approx(columns, rel=0.02)
