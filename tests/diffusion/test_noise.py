"""The denoising objective agrees with its formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from sbora_diffusion.diffusion.noise import Objective


def scheduler(prediction: str):
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_objective_agrees_with_its_formulas(prediction):
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    objective = Objective(scheduler(prediction).config, 0.0, 5.0)
    batch = objective.noised(objective.draw(latents, torch.Generator().manual_seed(0)))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    alpha = scheduler(prediction).alphas_cumprod[batch.timesteps].double().view(-1, 1, 1, 1)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = velocity if prediction == "v_prediction" else noise.double()
    torch.testing.assert_close(batch.noised.double(), noised, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.target.double(), target, rtol=0, atol=1e-5)
    snr = (alpha / (1 - alpha)).flatten()
    divisor = snr + 1 if prediction == "v_prediction" else snr
    torch.testing.assert_close(batch.weight.double(), snr.clamp(max=5) / divisor, rtol=1e-4, atol=0)


def test_the_loss_is_the_weighted_mean_of_the_squared_errors():
    objective = Objective(scheduler("epsilon").config, 0.0, None)
    latents = torch.zeros(2, 4, 8, 8)
    batch = objective.noised(objective.draw(latents, torch.Generator().manual_seed(0)))
    assert batch.weight.tolist() == [1, 1]
    assert objective.errors(batch.target + 2, batch).tolist() == pytest.approx([4, 4])


def test_the_noise_offset_is_constant_over_each_channel():
    plain, shifted = (
        Objective(scheduler("epsilon").config, offset, None).draw(
            torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(0)
        )
        for offset in (0.0, 0.5)
    )
    shift = shifted.noise - plain.noise
    assert shift.abs().max() > 0.1
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
