"""Samplers on data whose exact denoiser is known: error against the exact map, moments, and identities."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from scipy.stats import norm

from latentdiff.diffusion import samplers
from latentdiff.diffusion.grids import GRIDS
from latentdiff.diffusion.level import CLEAN, NoiseLevel
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS, denoiser
from latentdiff.diffusion.path import Straight, VariancePreserving, schedule_named
from latentdiff.diffusion.process import posterior_mean, transition
from latentdiff.diffusion.samplers import SAMPLERS, silent

SD = VariancePreserving.scaled_linear()
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


def rms_error(name, steps, path=SD, **options):
    """Against the exact map of the probability-flow ODE, the quantile map, over x_T ~ N(0, 1)."""
    x = norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    levels = log_snr_grid(steps)
    picture = last(SAMPLERS[name].walk(gaussian(MEAN, STD), x, levels, silent, path, **options))
    return math.sqrt(np.mean((picture - exact_map(x, levels[0], levels[-1])) ** 2))


def exact_map(x, top, bottom):
    """Of the probability-flow ODE of N(MEAN, STD^2): quantiles go to quantiles."""

    def deviation(level):
        return math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)

    return bottom.alpha * MEAN + deviation(bottom) / deviation(top) * (x - top.alpha * MEAN)


@pytest.mark.parametrize(
    ("name", "errors", "order"),
    [
        ("ddim", (3.528e-2, 1.796e-2, 9.062e-3), 1),
        ("dpmpp_2m", (2.431e-3, 6.345e-4, 1.604e-4), 2),
        ("heun_exponential", (4.929e-3, 1.284e-3, 3.274e-4), 2),
    ],
)
def test_error_and_order(name, errors, order):
    measured = [rms_error(name, steps) for steps in (20, 40, 80)]
    assert measured == pytest.approx(errors, rel=2e-3)
    fine = rms_error(name, 640), rms_error(name, 1280)
    assert math.log2(fine[0] / fine[1]) == pytest.approx(order, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("heun", {}, 2),
        ("dpm2", {}, 2),
        ("dpm2_ancestral", {"eta": 0.0}, 2),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
        ("dpmpp_sde", {"eta": 0.0}, 2),
        ("deis", {}, 2),
        ("res_multistep", {}, 2),
        ("dpmpp_3m_sde", {"eta": 0.0}, 2),
        ("lms", {}, 2),
    ],
)
def test_orders(name, options, order):
    """Without noise; linear multistep begins with lower orders, whose error is the last to go."""
    fine = [rms_error(name, steps, **options) for steps in (320, 640)]
    assert math.log2(fine[0] / fine[1]) > order - 0.1


@pytest.mark.parametrize(("name", "order"), [("lms", 4), ("ipndm", 4)])
def test_orders_from_exact_history(name, order):
    """On even steps in the method's own variable, the first steps made by a method of many small ones."""

    def error(steps):
        levels = [SD.level_of(float(ratio)) for ratio in np.linspace(3.0, 0.3, steps + 1)]
        x = levels[0].alpha * MEAN + np.linspace(-2, 2, 9)
        exact = [exact_map(x, levels[0], level) for level in levels]
        calls = itertools.count()

        def denoise(now, level):
            """The exact state in place of the sampler's own for its first four evaluations."""
            at = next(calls)
            return gaussian(MEAN, STD)(exact[at] if at < 4 else now, level)

        walk = SAMPLERS[name].walk(denoise, x, levels, silent, SD)
        for number, step in enumerate(walk, 1):
            if number < 4:
                step.x[...] = exact[number]  # the walk goes on from the array that it has yielded
        return np.abs(step.x - exact[-1]).max()

    assert math.log2(error(40) / error(80)) > order - 0.25


def test_res_multistep_is_exact_for_a_line():
    """Where x0 is linear in log-SNR l, each step but the first is the exact solution:
    x / sigma grows by the integral of exp(l) x0(l). The weights of dpmpp_2m are others.
    """
    levels = SD.levels(12, "karras")[:-1]

    def x0(level):
        return 0.3 + 0.2 * level.log_snr

    def integral(level):
        return math.exp(level.log_snr) * (x0(level) - 0.2)

    def errors(name):
        before, found = None, []
        for step, (t, s) in zip(
            SAMPLERS[name].walk(lambda x, level: x0(level) + 0 * x, np.ones(3), levels, silent, SD),
            itertools.pairwise(levels),
            strict=True,
        ):
            if before is not None:
                exact = s.sigma * (before / t.sigma + integral(s) - integral(t))
                found.append(np.abs(step.x - exact).max())
            before = step.x.copy()
        return max(found)

    assert errors("res_multistep") < 1e-12
    assert errors("dpmpp_2m") > 1e-3


@pytest.mark.parametrize("churn", [3.0, 1000.0])
def test_churn_is_the_algorithm_of_karras(churn):
    """Karras et al. 2022, algorithm 2, in their x / alpha over sigma / alpha, with S_noise 1 and no bounds."""
    levels = SD.levels(9, "karras")
    draws = np.random.default_rng(0).standard_normal((10, 7))
    ratios = [level.ratio for level in levels]
    y, gamma = draws[0] / levels[0].alpha, min(churn / 9, math.sqrt(2) - 1)

    def clean(y, ratio):
        return gaussian(MEAN, STD)(SD.level_of(ratio).alpha * y, SD.level_of(ratio))

    for number, (now, after) in enumerate(itertools.pairwise(ratios), 1):
        higher = now * (1 + gamma)
        y = y + math.sqrt(higher**2 - now**2) * draws[number]
        slope = (y - clean(y, higher)) / higher
        ahead = y + (after - higher) * slope
        if after > 0:
            ahead = y + (after - higher) * (slope + (ahead - clean(ahead, after)) / after) / 2
        y = ahead
    walk = SAMPLERS["heun"].walk(gaussian(MEAN, STD), draws[0], levels, lambda number: draws[number], SD, churn=churn)
    np.testing.assert_allclose(last(walk), y, rtol=1e-6, atol=1e-9)


def test_unipc_beats_its_predictor_by_an_order():
    """Zhao et al. 2023: the corrector raises the order of UniP-2 to 3."""
    errors = [rms_error("unipc", steps) for steps in (40, 80, 160)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([3, 3], abs=0.05)


@pytest.mark.parametrize(
    ("schedule", "std", "large", "small"),
    [(VariancePreserving.linear(), 0.5, 0.500751510, 0.496110080), (SD, 1.0, 0.999574910, 0.995901877)],
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
        next(SAMPLERS[name].walk(denoise, x, levels, silent)).x,
        next(samplers.ddim(denoise, x, levels, silent)).x,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    "name",
    ["ddim", "euler", "heun", "heun_exponential", "dpm2", "dpmpp_2m", "unipc", "deis", "lms", "ipndm", "res_multistep"],
)
def test_constant_x0_is_solved_exactly(name):
    """x_s = sigma_s noise + alpha_s x0 at every level, for any grid."""
    noise = np.linspace(-2, 2, 9)
    levels = SD.levels(7, "karras")
    x = levels[0].alpha * 0.3 + levels[0].sigma * noise
    for step in SAMPLERS[name].walk(lambda x, level: np.full_like(x, 0.3), x, levels, silent, SD):
        np.testing.assert_allclose(step.x, step.level.alpha * 0.3 + step.level.sigma * noise, rtol=1e-10, atol=1e-12)


def test_sde_keeps_the_marginal():
    """On N(0, 1) data with exact denoiser every marginal is N(0, 1); variance is read off as in the ancestral test."""
    levels = SD.levels(100, "exponential")[:-1]
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


PATHS = {
    f"{kind}{'_ztsnr' if terminal else ''}": (
        schedule_named(kind, 1000).zero_terminal_snr() if terminal else schedule_named(kind, 1000)
    )
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid")
    for terminal in (False, True)
} | {"straight": Straight(), "straight_shifted": Straight(3.0)}


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("counts", [(1, 2, 7), pytest.param((50,), marks=pytest.mark.slow)], ids=["few", "many"])
def test_every_combination_ends_finite(counts, path, spacing):
    """Every sampler x path x prediction x grid, with 1, 2, 7 and 50 steps, on an untrained network."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((102, 2, 3)).astype(np.float32)
    for steps in counts:
        levels = PATHS[path].levels(steps, spacing)
        for name, prediction in itertools.product(SAMPLERS, PARAMETRIZATIONS):
            denoise = denoiser(lambda x, t, _: np.tanh(x) + 0 * np.float32(t), prediction, None)
            *_, step = SAMPLERS[name].walk(denoise, draws[0], levels, lambda number: draws[number], PATHS[path])
            assert np.isfinite(step.x).all(), (name, prediction, steps)
            assert (step.number, step.x.dtype, step.level.sigma) == (steps, np.float32, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_and_torch_agree(name):
    levels = SD.zero_terminal_snr().levels(9)
    draws = np.random.default_rng(0).standard_normal((19, 2, 4)).astype(np.float32)
    of_numpy = last(SAMPLERS[name].walk(gaussian(MEAN, STD), draws[0], levels, lambda number: draws[number], SD))
    tensors = torch.from_numpy(draws)
    of_torch = last(SAMPLERS[name].walk(gaussian(MEAN, STD), tensors[0], levels, lambda number: tensors[number], SD))
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


# identities of the stochastic and the distilled ones


@pytest.mark.parametrize(("name", "plain"), [("dpm2_ancestral", "dpm2"), ("dpmpp_3m_sde", None)])
def test_without_noise_they_add_none(name, plain):
    """With eta 0 no noise is drawn, and dpm2_ancestral is dpm2."""
    levels, x = SD.levels(10), np.linspace(-2, 2, 9)

    def never(number):
        raise AssertionError("drawn")

    picture = last(SAMPLERS[name].walk(gaussian(MEAN, STD), x, levels, never, SD, eta=0.0))
    if plain:
        np.testing.assert_array_equal(picture, last(SAMPLERS[plain].walk(gaussian(MEAN, STD), x, levels, silent, SD)))


@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "heun"])
def test_stochastic_ones_keep_the_marginal(name):
    """On N(0, 1) data with the exact denoiser every marginal of a variance-preserving path is N(0, 1)."""
    levels = SD.levels(60, "exponential")[:-1]
    draws = np.random.default_rng(0).standard_normal((130, 50_000))
    options = {"churn": 20.0} if name == "heun" else {}
    walk = SAMPLERS[name].walk(gaussian(0.0, 1.0), draws[-1], levels, lambda number: draws[number], SD, **options)
    x = last(walk)
    assert x.std() == pytest.approx(1, abs=0.015)
    assert x.mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("grid", GRIDS)
def test_tcd_without_noise_is_ddim(grid):
    """On every grid, also between whole times: each step ends at its own level."""
    levels = SD.levels(12, grid)
    x = np.linspace(-2, 2, 9)
    walks = (SAMPLERS[name].walk(gaussian(MEAN, STD), x, levels, silent, SD, eta=0.0) for name in ("tcd", "ddim"))
    for ours, theirs in zip(*walks, strict=True):
        np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-9, atol=1e-12)


def k_diffusion_ancestral(sigma_from, sigma_to, eta=1.0):
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def in_ve(denoise):
    """The denoiser of x / alpha over sigma / alpha, as Karras et al. and k-diffusion write it."""
    return lambda y, ratio: denoise(SD.level_of(ratio).alpha * y, SD.level_of(ratio))


def k_heun(model, y, sigmas, noise):
    for s, n in itertools.pairwise(sigmas):
        d = (y - model(y, s)) / s
        if n == 0:
            y = y + d * (n - s)
        else:
            there = y + d * (n - s)
            y = y + (d + (there - model(there, n)) / n) / 2 * (n - s)
    return y


def k_dpm2_ancestral(model, y, sigmas, noise):
    for i, (s, n) in enumerate(itertools.pairwise(sigmas), 1):
        down, up = k_diffusion_ancestral(s, n)
        d = (y - model(y, s)) / s
        if down == 0:
            y = y + d * (down - s)
        else:
            middle = math.exp((math.log(s) + math.log(down)) / 2)
            there = y + d * (middle - s)
            y = y + (there - model(there, middle)) / middle * (down - s) + up * noise(i)
    return y


def k_dpmpp_2s_ancestral(model, y, sigmas, noise):
    for i, (s, n) in enumerate(itertools.pairwise(sigmas), 1):
        down, up = k_diffusion_ancestral(s, n)
        x0 = model(y, s)
        if down == 0:
            y = x0
        else:
            h = math.log(s / down)
            middle = s * math.exp(-h / 2)
            there = middle / s * y - math.expm1(-h / 2) * x0
            y = down / s * y - math.expm1(-h) * model(there, middle) + up * noise(i)
    return y


def k_dpmpp_sde(model, y, sigmas, noise):
    """Its noise is that of one Brownian motion W over sigma: (W(a) - W(b)) / sqrt(a - b) between any two levels."""
    w = 0.0  # at the level reached
    for i, (s, n) in enumerate(itertools.pairwise(sigmas), 1):
        x0 = model(y, s)
        if n == 0:
            return x0
        middle = math.sqrt(s * n)
        w_middle = w + math.sqrt(s - middle) * noise(2 * i - 1)
        w_next = w_middle + math.sqrt(middle - n) * noise(2 * i)
        down, up = k_diffusion_ancestral(s, middle)
        there = x0 + down / s * (y - x0) + up * (w_middle - w) / math.sqrt(s - middle)
        down, up = k_diffusion_ancestral(s, n)
        y = model(there, middle) * (1 - down / s) + down / s * y + up * (w_next - w) / math.sqrt(s - n)
        w = w_next
    return y


def k_dpmpp_3m_sde(model, y, sigmas, noise, eta=1.0):
    x0_1 = x0_2 = h_1 = h_2 = None
    for i, (s, n) in enumerate(itertools.pairwise(sigmas), 1):
        x0 = model(y, s)
        if n == 0:
            return x0
        h = math.log(s / n)
        k = h * (eta + 1)
        y = math.exp(-k) * y - math.expm1(-k) * x0
        phi_2 = math.expm1(-k) / k + 1
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            a, b = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            y = y + phi_2 * (a + (a - b) * r0 / (r0 + r1)) - (phi_2 / k - 0.5) * (a - b) / (r0 + r1)
        elif h_1 is not None:
            y = y + phi_2 * (x0 - x0_1) / (h_1 / h)
        y = y + noise(i) * n * math.sqrt(-math.expm1(-2 * h * eta))
        x0_1, x0_2, h_1, h_2 = x0, x0_1, h, h_1
    return y


def k_lms(model, y, sigmas, noise, order=4):
    slopes = []
    for i, (s, n) in enumerate(itertools.pairwise(sigmas)):
        slopes = [*slopes, (y - model(y, s)) / s][-order:]
        known = sigmas[max(0, i - order + 1) : i + 1]
        for j, slope in enumerate(slopes):
            others = np.delete(known, j)
            basis = np.atleast_1d(np.poly(others)) / np.prod(known[j] - others)
            integral = np.polyint(basis)
            y = y + slope * (np.polyval(integral, n) - np.polyval(integral, s))
    return y


def k_ipndm(model, y, sigmas, noise):
    weights = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}
    slopes = []
    for s, n in itertools.pairwise(sigmas):
        if n == 0:
            return model(y, s)
        slopes = [(y - model(y, s)) / s, *slopes[:3]]
        w = np.array(weights[len(slopes)])
        y = y + (n - s) * sum(a * b for a, b in zip(w / w.sum(), slopes, strict=True))
    return y


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("heun", k_heun),
        ("dpm2_ancestral", k_dpm2_ancestral),
        ("dpmpp_2s_ancestral", k_dpmpp_2s_ancestral),
        ("dpmpp_sde", k_dpmpp_sde),
        ("dpmpp_3m_sde", k_dpmpp_3m_sde),
        ("lms", k_lms),
        ("ipndm", k_ipndm),
    ],
)
def test_against_the_formulas_of_k_diffusion(name, theirs):
    """The same numbers as their algorithms in x / alpha over sigma / alpha, written out above from the definitions."""
    levels = SD.levels(12, "karras")
    draws = np.random.default_rng(0).standard_normal((30, 5))
    x = draws[-1]
    ours = last(SAMPLERS[name].walk(gaussian(MEAN, STD), x, levels, lambda number: draws[number], SD))

    def noise(number):
        return draws[number]

    sigmas = np.array([level.ratio for level in levels])
    expected = theirs(in_ve(gaussian(MEAN, STD)), x / levels[0].alpha, sigmas, noise)
    np.testing.assert_allclose(ours, expected, rtol=1e-7)


def test_deis_against_diffusers():
    """The latents of every step of diffusers.DEISMultistepScheduler of order 2, which ends above sigma 0."""
    scheduler = DEISMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(10)
    x = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def eps(x, t, _=None):
        return torch.tanh(x + float(t) / 1000)

    levels = [*(SD.level(int(t)) for t in scheduler.timesteps), CLEAN]
    steps = samplers.deis(denoiser(eps, "epsilon", None), x, levels, silent)
    for number, (step, t) in enumerate(zip(steps, scheduler.timesteps, strict=True), 1):
        theirs = scheduler.step(eps(theirs, t), t, theirs).prev_sample
        if number < 9:  # their last two steps are of order 1
            torch.testing.assert_close(step.x, theirs, rtol=1e-3, atol=1e-3)


def test_tcd_against_diffusers():
    """Every step of diffusers.TCDScheduler with gamma 0.3, with the noise that it draws."""
    scheduler = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    x = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def eps(x, t, _=None):
        return torch.tanh(x + float(t) / 1000)

    generator, expected = torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, t), t, theirs, eta=0.3, generator=generator).prev_sample
        expected.append(theirs)
    generator = torch.Generator().manual_seed(1)
    levels = [*(SD.level(int(t)) for t in scheduler.timesteps), CLEAN]
    steps = samplers.tcd(
        denoiser(eps, "epsilon", None), x, levels, lambda _: torch.randn(x.shape, generator=generator), SD, eta=0.3
    )
    for step, after in zip(steps, expected[:-1], strict=False):  # their last step ends at time 0, which is not clean
        torch.testing.assert_close(step.x, after, rtol=2e-3, atol=2e-3)


# on a straight path


def mixture(x, level, means=(-1.5, 0.2, 1.0), stds=(0.2, 0.4, 0.1), shares=(0.3, 0.4, 0.3)):
    """E[x0 | x_t] of a mixture of three Gaussians."""
    weighed = total = 0.0
    for mean, std, share in zip(means, stds, shares, strict=True):
        variance = level.alpha**2 * std**2 + level.sigma**2
        density = share * np.exp(-0.5 * (x - level.alpha * mean) ** 2 / variance) / math.sqrt(variance)
        weighed = weighed + density * (mean + level.alpha * std**2 / variance * (x - level.alpha * mean))
        total = total + density
    return weighed / total


def straight_levels(steps):
    """From s = 0.95 to 0.05 in equal steps of s."""
    return [Straight().level(1000 * float(s)) for s in np.linspace(0.95, 0.05, steps + 1)]


def test_the_straight_map_of_gaussian_data():
    """Every sampler without noise goes towards the map of the probability-flow ODE on the straight path."""
    levels, x = straight_levels(2000), np.linspace(-2, 2, 9)
    picture = last(samplers.dpmpp_2m(gaussian(MEAN, STD), x, levels))
    np.testing.assert_allclose(picture, exact_map(x, levels[0], levels[-1]), atol=3e-6)


def test_euler_is_the_flow_models_euler():
    """x_s = x_t + (s - t) v, as diffusers' FlowMatchEulerDiscreteScheduler steps, on its own levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    levels = Straight(3.0).levels(8)
    np.testing.assert_allclose([level.sigma for level in levels], scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose([level.t for level in levels[:-1]], scheduler.timesteps.numpy(), rtol=1e-6)

    def velocity(x, t, _=None):
        return torch.tanh(x + float(t) / 1000)

    x = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        theirs = scheduler.step(velocity(theirs, t), t, theirs).prev_sample
    ours = last(samplers.euler(denoiser(velocity, "flow", None), x, levels))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("ddim", 1),
        ("heun", 2),
        ("heun_exponential", 2),
        ("dpm2", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_2s_ancestral", 2),
        ("deis", 2),
        ("res_multistep", 2),
        ("unipc", 2),
        ("lms", 2),
    ],
)
def test_orders_on_a_straight_path(name, order):
    """On a mixture of three Gaussians, against 32 times as many steps of a method of second order."""
    x = np.linspace(-1.8, 1.8, 13)
    options = {"eta": 0.0} if name.endswith("ancestral") else {}
    reference = last(samplers.heun(mixture, x, straight_levels(10_240), silent, Straight()))
    errors = [
        np.abs(
            last(SAMPLERS[name].walk(mixture, x, straight_levels(n), silent, Straight(), **options)) - reference
        ).max()
        for n in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) > order - 0.2


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde"])
def test_stochastic_ones_on_a_straight_path(name):
    """Of N(0, 1) data the deviation at s is sqrt((1 - s)^2 + s^2), whatever noise was added on the way."""
    levels = straight_levels(200)
    draws = np.random.default_rng(0).standard_normal((402, 50_000))
    start = math.hypot(levels[0].alpha, levels[0].sigma) * draws[-1]
    x = last(SAMPLERS[name].walk(gaussian(0.0, 1.0), start, levels, lambda number: draws[number], Straight()))
    assert x.std() == pytest.approx(math.hypot(levels[-1].alpha, levels[-1].sigma), rel=0.02)


# the table


def test_one_row_has_all_that_is_known_of_a_sampler():
    assert len({row.label for row in SAMPLERS.values()}) == len(SAMPLERS)
    named = [scheduler for row in SAMPLERS.values() for scheduler in row.schedulers]
    assert len(set(named)) == len(named)
    for row in SAMPLERS.values():
        assert set(row.options) <= {"eta", "churn"}
    assert samplers.sampler_of("TCDScheduler") == "tcd"
    assert samplers.sampler_of("SomeScheduler") is None


def test_an_option_of_another_sampler_is_refused():
    with pytest.raises(ValueError, match="Euler takes no eta"):
        SAMPLERS["euler"].with_options(eta=0.5)
