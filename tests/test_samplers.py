"""Samplers on data whose exact denoiser is known: error against the exact map, moments, and identities."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from scipy.stats import norm

from latentdiff.diffusion import samplers
from latentdiff.diffusion.parametrization import denoiser
from latentdiff.diffusion.path import CLEAN, SPACINGS, NoiseLevel, NoiseSchedule, schedule_named
from latentdiff.diffusion.process import posterior_mean, transition
from latentdiff.diffusion.samplers import SAMPLERS, silent

SD = NoiseSchedule.scaled_linear()
MEAN, STD = 0.7, 0.5


def gaussian(mean, std):
    """E[x0 | x_t] of data N(mean, std^2)."""

    def denoise(x, level):
        variance = level.alpha**2 * std**2 + level.sigma**2
        return mean + level.alpha * std**2 / variance * (x - level.alpha * mean)

    return denoise


def last(steps):
    *_, step = steps
    return step.x


def log_snr_grid(steps):
    """From t = 999 to t = 1, even in log-SNR."""
    log_snrs = np.linspace(SD.level(999).log_snr, SD.level(1).log_snr, steps + 1)
    return [NoiseLevel(0.0, (1 + math.exp(-2 * s)) ** -0.5, (1 + math.exp(2 * s)) ** -0.5) for s in log_snrs]


def rms_error(name, steps):
    """Against the exact map of the probability-flow ODE, the quantile map, over x_T ~ N(0, 1)."""
    x = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    top, bottom = SD.level(999), SD.level(1)

    def deviation(level):
        return math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)

    exact = bottom.alpha * MEAN + deviation(bottom) / deviation(top) * (x - top.alpha * MEAN)
    drawn = last(SAMPLERS[name](gaussian(MEAN, STD), x, log_snr_grid(steps), silent))
    return math.sqrt(np.mean((drawn - exact) ** 2))


@pytest.mark.parametrize(
    ("name", "errors", "order"),
    [
        ("ddim", (3.528e-2, 1.796e-2, 9.062e-3), 1),
        ("dpmpp_2m", (2.431e-3, 6.345e-4, 1.604e-4), 2),
        ("heun", (4.929e-3, 1.284e-3, 3.274e-4), 2),
    ],
)
def test_error_and_order(name, errors, order):
    measured = [rms_error(name, steps) for steps in (20, 40, 80)]
    assert measured == pytest.approx(errors, rel=1e-3)
    fine = rms_error(name, 640), rms_error(name, 1280)
    assert math.log2(fine[0] / fine[1]) == pytest.approx(order, abs=0.02)


def test_unipc_beats_its_predictor_by_an_order():
    """Zhao et al. 2023: the corrector raises the order of UniP-2 to 3."""
    errors = [rms_error("unipc", steps) for steps in (40, 80, 160)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([3, 3], abs=0.05)


@pytest.mark.parametrize(
    ("schedule", "std", "large", "small"),
    [(NoiseSchedule.linear(), 0.5, 0.500751510, 0.496110080), (SD, 1.0, 0.999574910, 0.995901877)],
)
def test_ancestral_standard_deviation(schedule, std, large, small):
    """Mean and variance propagate through the steps exactly: the sampler is affine in x for a Gaussian denoiser.

    The gain of a step is read off the sampler itself by feeding it 0 and 1, its noise by feeding it noise 1.
    """
    levels = [schedule.level(t) for t in reversed(range(1000))] + [schedule.levels(1)[-1]]
    for variance, expected in (("large", large), ("small", small)):
        total = 1.0
        for pair in itertools.pairwise(levels):
            step = partial(samplers.ddpm, gaussian(0.0, std), levels=pair, variance=variance)
            gain = last(step(x=1.0, noise=silent))
            added = last(step(x=0.0, noise=lambda number: 1.0))
            total = gain**2 * total + added**2
        assert math.sqrt(total) == pytest.approx(expected, abs=2e-9)


def steps_of(sampler, levels, seed=0):
    draws = np.random.default_rng(seed).standard_normal((len(levels), 64))
    return last(sampler(gaussian(MEAN, STD), draws[-1], levels, lambda number: draws[number - 1]))


def test_ddim_is_euler():
    levels = SD.levels(20)
    np.testing.assert_allclose(steps_of(samplers.ddim, levels), steps_of(samplers.euler, levels), rtol=1e-12)


def test_euler_is_euler_in_sigma_over_alpha():
    """d(x/alpha) = (sigma_s/alpha_s - sigma_t/alpha_t) (x/alpha - x0) / (sigma_t/alpha_t)."""
    levels = SD.levels(20)[:-1]
    x = x_there = np.linspace(-2, 2, 9)
    denoise = gaussian(MEAN, STD)
    for t, s in itertools.pairwise(levels):
        scaled, rho_t, rho_s = x_there / t.alpha, t.sigma / t.alpha, s.sigma / s.alpha
        x_there = s.alpha * (scaled + (rho_s - rho_t) * (scaled - denoise(x_there, t)) / rho_t)
    np.testing.assert_allclose(last(samplers.euler(denoise, x, levels)), x_there, rtol=1e-11)


def test_ddim_with_eta_one_is_ddpm():
    levels = SD.levels(1000)
    np.testing.assert_allclose(
        steps_of(partial(samplers.ddim, eta=1.0), levels), steps_of(samplers.ddpm, levels), rtol=1e-8
    )


def test_euler_ancestral_is_ddpm_and_without_eta_euler():
    levels = SD.levels(20)
    np.testing.assert_allclose(steps_of(samplers.euler_ancestral, levels), steps_of(samplers.ddpm, levels), rtol=1e-10)
    np.testing.assert_allclose(
        steps_of(partial(samplers.euler_ancestral, eta=0.0), levels), steps_of(samplers.euler, levels), rtol=1e-10
    )


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_first_multistep_is_ddim(name):
    levels, x, denoise = SD.levels(10), np.linspace(-2, 2, 9), gaussian(MEAN, STD)
    np.testing.assert_allclose(
        next(SAMPLERS[name](denoise, x, levels, silent)).x,
        next(samplers.ddim(denoise, x, levels, silent)).x,
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_constant_x0_is_solved_exactly(name):
    """x_s = sigma_s noise + alpha_s x0 at every level, for any grid."""
    noise = np.linspace(-2, 2, 9)
    levels = SD.levels(7, "karras")
    x = levels[0].alpha * 0.3 + levels[0].sigma * noise
    for step in SAMPLERS[name](lambda x, level: np.full_like(x, 0.3), x, levels, silent):
        np.testing.assert_allclose(step.x, step.level.alpha * 0.3 + step.level.sigma * noise, rtol=1e-10, atol=1e-12)


def test_sde_keeps_the_marginal():
    """On N(0, 1) data with exact denoiser every marginal is N(0, 1); variance is read off as in the ancestral test."""
    levels = SD.levels(100, "uniform")[:-1]
    denoise = gaussian(0.0, 1.0)
    draws = np.random.default_rng(0).standard_normal((101, 100_000))
    x = last(samplers.dpmpp_2m_sde(denoise, draws[-1], levels, lambda number: draws[number - 1]))
    assert x.std() == pytest.approx(1, abs=0.01)
    assert x.mean() == pytest.approx(0, abs=0.02)


def test_sde_first_step_is_ancestral():
    """Both are the exact posterior for constant x0: (r q, alpha_s (1 - q^2), sigma_s sqrt(1 - q^2))."""
    levels = SD.levels(10)[:2]
    ones = np.ones(3)
    ours = last(samplers.dpmpp_2m_sde(lambda x, level: 0.3 * ones, ones, levels, lambda number: 2 * ones))
    step = transition(levels[1], levels[0])
    expected = posterior_mean(ones, 0.3 * ones, levels[1], levels[0]) + math.sqrt(step.variance) * 2 * ones
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_against_diffusers(prediction, eta):
    """The same steps as diffusers.DDIMScheduler on a network of fixed weights, in float32."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    rng = np.random.default_rng(0)
    draws = torch.from_numpy(rng.standard_normal((21, 2, 4, 8, 8)).astype(np.float32))

    def network(x, t, context):
        return torch.tanh(0.7 * x + 0.1) * (0.5 + t / 2000)

    theirs = draws[-1]
    for number, t in enumerate(scheduler.timesteps):
        out = network(theirs, float(t), None)
        theirs = scheduler.step(out, t, theirs, eta=eta, variance_noise=draws[number] if eta else None).prev_sample
    ours = last(
        samplers.ddim(
            denoiser(network, prediction, None), draws[-1], SD.levels(20), lambda number: draws[number - 1], eta=eta
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


SCHEDULES = {
    f"{kind}{'_ztsnr' if terminal else ''}": (
        schedule_named(kind, 1000).zero_terminal_snr() if terminal else schedule_named(kind, 1000)
    )
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid")
    for terminal in (False, True)
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_combination_ends_finite(name, schedule, spacing):
    """Every sampler x schedule x prediction x grid, with 1, 2, 7 and 50 steps, on an untrained network."""
    rng = np.random.default_rng(0)
    for prediction, steps in itertools.product(("epsilon", "sample", "v_prediction"), (1, 2, 7, 50)):
        levels = SCHEDULES[schedule].levels(steps, spacing)
        denoise = denoiser(lambda x, t, context: np.tanh(x), prediction, None)
        x = rng.standard_normal((2, 3)).astype(np.float32)
        for step in SAMPLERS[name](denoise, x, levels, lambda number: rng.standard_normal((2, 3), dtype=np.float32)):
            assert np.isfinite(step.x).all(), (prediction, steps, step.number)
        assert (step.number, step.x.dtype, step.level.sigma) == (steps, np.float32, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_and_torch_agree(name):
    levels = SD.zero_terminal_snr().levels(9)
    draws = np.random.default_rng(0).standard_normal((10, 2, 4)).astype(np.float32)
    of_numpy = last(SAMPLERS[name](gaussian(MEAN, STD), draws[0], levels, lambda number: draws[number]))
    tensors = torch.from_numpy(draws)
    of_torch = last(SAMPLERS[name](gaussian(MEAN, STD), tensors[0], levels, lambda number: tensors[number]))
    np.testing.assert_allclose(of_torch.numpy(), of_numpy, rtol=1e-5, atol=1e-6)


def test_lcm_against_diffusers():
    """The x0 of every step and the picture of diffusers.LCMScheduler, with the noise that it draws."""
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def eps(x, t, context=None):
        return torch.tanh(x + float(t) / 1000)

    theirs, generator = [x], torch.Generator().manual_seed(1)
    denoised = []
    for t in scheduler.timesteps:
        out = scheduler.step(eps(theirs[-1], t), t, theirs[-1], generator=generator)
        theirs.append(out.prev_sample)
        denoised.append(out.denoised)
    generator = torch.Generator().manual_seed(1)
    levels = [*(SD.level(int(t)) for t in scheduler.timesteps), CLEAN]
    steps = samplers.lcm(denoiser(eps, "epsilon", None), x, levels, lambda _: torch.randn(x.shape, generator=generator))
    for step, x0, after in zip(steps, denoised, theirs[1:], strict=True):
        torch.testing.assert_close(step.x0, x0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.x, after, rtol=1e-4, atol=1e-5)
