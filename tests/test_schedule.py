"""The noise schedule against numbers worked by hand and against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import rescale_zero_terminal_snr

from onestroke.errors import ModelError
from onestroke.sample import student_scheduler
from onestroke.schedule import NoiseSchedule, student_timesteps

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
ZERO_SNR = SDXL | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
T = torch.tensor([0, 3, 249, 700, 999])


def hand_schedule() -> NoiseSchedule:
    """alpha_0 = 0.8 and sigma_0 = 0.6; alpha_1 = 0.6 and sigma_1 = 0.8."""
    return NoiseSchedule(torch.tensor([0.64, 0.36], dtype=torch.float64))


def full(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sdxl_ends_at_its_published_rates():
    alpha, sigma = NoiseSchedule.from_config(SDXL).rates(torch.tensor([999]), torch.zeros(1).double())
    assert alpha.item() == pytest.approx(0.06826, abs=5e-6)
    assert (sigma / alpha).item() == pytest.approx(14.6146, abs=5e-5)
    assert sigma.item() == pytest.approx((1 - 0.06826**2) ** 0.5, abs=1e-6)


def test_linear_and_explicit_betas_multiply_up_to_alphas_cumprod():
    linear = NoiseSchedule.from_config(
        {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
    )
    assert linear.alphas_cumprod.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])
    explicit = NoiseSchedule.from_config({"trained_betas": [0.5, 0.25]})
    assert explicit.alphas_cumprod.tolist() == pytest.approx([0.5, 0.375]) and len(explicit) == 2


def test_a_scheduler_without_a_known_beta_schedule_or_prediction_is_refused_not_guessed():
    with pytest.raises(ModelError, match="no beta schedule"):
        NoiseSchedule.from_config({"prediction_type": "epsilon", "sigma_max": 80.0})  # an EDM model's
    with pytest.raises(ModelError, match="squaredcos_cap_v2"):
        NoiseSchedule.from_config(SDXL | {"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(ModelError, match="flow_prediction"):
        NoiseSchedule.from_config(SDXL | {"prediction_type": "flow_prediction"})


def test_add_noise_matches_hand_computation():
    x_t = hand_schedule().add_noise(full(1.0, 1.0), full(2.0, 2.0), torch.tensor([0, 1]))
    assert x_t.flatten().tolist() == pytest.approx([0.8 + 1.2, 0.6 + 1.6])


@pytest.mark.parametrize(("kind", "output"), [("epsilon", 2.0), ("v_prediction", 0.8 * 2 - 0.6 * 1), ("sample", 1.0)])
def test_every_prediction_type_is_read_as_x0_and_written_back_by_hand_numbers(kind, output):
    """x0 = 1, eps = 2, alpha = 0.8, sigma = 0.6: x_t = 2, v = alpha eps - sigma x0 = 1."""
    schedule, t, x_t = hand_schedule(), torch.tensor([0]), full(2.0)
    assert schedule.to_x0(full(output), x_t, t, kind).item() == pytest.approx(1.0)
    assert schedule.from_x0(full(1.0), x_t, t, kind).item() == pytest.approx(output)
    assert schedule.target(full(1.0), full(2.0), t, kind).item() == pytest.approx(output)


@pytest.mark.parametrize("config", [SDXL, ZERO_SNR], ids=["epsilon", "zero-snr"])
def test_rates_noise_and_velocity_agree_with_diffusers(config):
    schedule, reference = NoiseSchedule.from_config(config), DDIMScheduler(**config, clip_sample=False)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), reference.alphas_cumprod, atol=2e-6, rtol=1e-5)
    x0, eps = noise(5, 4, 2, 2).float(), noise(5, 4, 2, 2, seed=1).float()
    torch.testing.assert_close(schedule.add_noise(x0, eps, T), reference.add_noise(x0, eps, T), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        schedule.target(x0, eps, T, "v_prediction"), reference.get_velocity(x0, eps, T), atol=2e-5, rtol=1e-4
    )


def test_zero_terminal_snr_is_diffusers_own_rescaling():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, atol=1e-12, rtol=1e-9)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.ends_in_pure_noise
    assert schedule.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)  # the first is unchanged
    assert not NoiseSchedule.from_config(SDXL).ends_in_pure_noise


def test_epsilon_with_rescaled_betas_keeps_the_original_rates():
    """Rescaled, alpha_999 would be 0, or diffusers' 2^-12, and x0 = (x_t - sigma eps) / alpha 4096 times larger."""
    rescaled = SDXL | {"rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(rescaled)
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule.from_config(SDXL).alphas_cumprod)
    wrong_by_one = schedule.to_x0(full(1.0), full(0.0), torch.tensor([999]), "epsilon")
    assert wrong_by_one.abs().item() == pytest.approx(14.6146, abs=1e-4)
    exported = student_scheduler(rescaled)  # and what is exported reads x0 by the same rates
    exported.set_timesteps(1)
    assert exported.sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize(("count", "expected"), [(1, (999,)), (2, (999, 499)), (4, (999, 749, 499, 249))])
def test_student_timesteps_are_the_published_grids(count, expected):
    assert student_timesteps(count) == expected


def test_student_timesteps_are_the_exported_schedulers_and_never_0():
    scheduler = EulerAncestralDiscreteScheduler(**SDXL, timestep_spacing="trailing")
    for count in range(1, 65):
        scheduler.set_timesteps(count)
        theirs = tuple(scheduler.timesteps.int().tolist())
        assert student_timesteps(count) == theirs[:count]  # of 61 steps diffusers makes 62, the last at -1
        assert min(student_timesteps(count)) > 0 and student_timesteps(count)[0] == 999


@pytest.mark.parametrize("config", [SDXL, ZERO_SNR], ids=["epsilon", "zero-snr"])
def test_the_student_is_fed_pure_noise_at_the_last_timestep_and_only_there(config):
    schedule = NoiseSchedule.from_config(config)
    x0, other, eps = noise(5, 4, 2, 2), noise(5, 4, 2, 2, seed=1), noise(5, 4, 2, 2, seed=2)
    t = torch.tensor([249, 499, 749, 998, 999])
    fed = schedule.student_input(x0, eps, t)
    assert torch.equal(fed[4], schedule.student_input(other, eps, t)[4])  # whatever the picture
    torch.testing.assert_close(fed[4], schedule.rates(t, eps)[1][4] * eps[4])
    torch.testing.assert_close(fed[:4], schedule.add_noise(x0, eps, t)[:4])
    assert all((fed[i] - schedule.student_input(other, eps, t)[i]).abs().max() > 1e-3 for i in range(4))


@pytest.mark.parametrize("config", [SDXL, ZERO_SNR], ids=["epsilon", "zero-snr"])
def test_the_student_is_fed_what_the_exported_scheduler_feeds_at_its_first_step(config):
    scheduler = student_scheduler(config)
    scheduler.set_timesteps(1)
    eps = noise(1, 4, 2, 2).float()
    drawn = scheduler.scale_model_input(eps * scheduler.init_noise_sigma, scheduler.timesteps[0])
    trained = NoiseSchedule.from_config(config).student_input(torch.ones_like(eps), eps, torch.tensor([999]))
    torch.testing.assert_close(trained, drawn, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [SDXL, ZERO_SNR], ids=["epsilon", "zero-snr"])
def test_later_steps_see_the_noise_level_that_the_student_trained_at(config):
    """Euler's x0 + sigma eps, scaled for the model, is alpha x0 + sqrt(1 - alpha^2) eps."""
    scheduler, schedule = student_scheduler(config), NoiseSchedule.from_config(config)
    scheduler.set_timesteps(4)
    x0, eps = noise(1, 4, 2, 2).float(), noise(1, 4, 2, 2, seed=1).float()
    for t in scheduler.timesteps[1:]:
        scheduler._step_index = None
        seen = scheduler.scale_model_input(scheduler.add_noise(x0, eps, t[None]), t)
        torch.testing.assert_close(seen, schedule.student_input(x0, eps, t[None].long()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("config", "kind"), [(SDXL, "epsilon"), (ZERO_SNR, "v_prediction")])
def test_x0_agrees_with_the_euler_schedulers_own_reading_at_each_of_4_steps(config, kind):
    schedule = NoiseSchedule.from_config(config)
    scheduler = EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    output, x_t = noise(1, 4, 2, 2).float(), noise(1, 4, 2, 2, seed=1).float()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        scheduler._step_index, scheduler.is_scale_input_called = None, True
        expected = scheduler.step(output, t, x_t * (sigma**2 + 1) ** 0.5).pred_original_sample
        torch.testing.assert_close(schedule.to_x0(output, x_t, t[None].long(), kind), expected, atol=2e-3, rtol=1e-3)


def test_low_precision_predictions_are_read_in_float32_and_float64_stays_float64():
    schedule, t = NoiseSchedule.from_config(SDXL), torch.tensor([999])
    low = full(0.5).bfloat16()
    for kind in ("epsilon", "v_prediction", "sample"):
        assert schedule.to_x0(low, low.float(), t, kind).dtype == torch.float32
        assert schedule.to_x0(full(0.5), full(0.5), t, kind).dtype == torch.float64
