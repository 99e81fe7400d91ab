"""The denoising objective agrees with its formulas."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sbora_diffusion.diffusion.noise import FlowObjective, Objective


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


def test_a_flow_mixes_as_its_scheduler_does_and_a_prediction_explains_itself():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = FlowObjective(scheduler.config, 0.0, None)
    generator = torch.Generator().manual_seed(0)
    draw = objective.draw(torch.randn(64, 4, 8, 8, generator=generator), generator)
    times = scheduler.timesteps[torch.arange(0, 960, 15)]
    draw = draw._replace(timesteps=times)
    batch = objective.noised(draw)
    expected = scheduler.scale_noise(draw.latents, times, draw.noise)
    torch.testing.assert_close(batch.noised, expected)
    assert torch.equal(batch.target, draw.noise - draw.latents)
    predicted = torch.randn(64, 4, 8, 8, generator=generator)
    latents, noise = objective.explained(batch, predicted)
    again = objective.noised(draw._replace(latents=latents, noise=noise))
    torch.testing.assert_close(again.noised, batch.noised, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.target, predicted, rtol=0, atol=1e-5)


def test_timesteps_of_a_flow_are_logit_normal_and_shifted():
    objective = FlowObjective(FlowMatchEulerDiscreteScheduler(shift=3.0).config, 0.0, None)
    draw = objective.draw(torch.zeros(4000, 1, 1, 1), torch.Generator().manual_seed(0))
    sigma = draw.timesteps.sort().values / 1000
    quantiles = torch.tensor([0.1587, 0.5, 0.8413])  # of a normal at -1, 0, 1
    plain = torch.tensor([-1.0, 0.0, 1.0]).sigmoid()
    expected = 3 * plain / (1 + 2 * plain)
    torch.testing.assert_close(sigma.quantile(quantiles), expected, rtol=0, atol=0.01)


def test_a_weight_for_each_place_counts_only_what_it_covers():
    objective = Objective(scheduler("epsilon").config, 0.0, None)
    draw = objective.draw(torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 2.0
    batch = objective.noised(draw._replace(weight=mask))
    predicted = batch.target + torch.ones(2, 4, 8, 8)
    predicted[:, :, 4:] += 100
    assert objective.errors(predicted, batch).tolist() == pytest.approx([1, 0])
