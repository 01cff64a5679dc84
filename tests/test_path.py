"""Schedules against their closed forms and against diffusers."""

import itertools
import math

import numpy as np
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats

from latentdiff.diffusion.grids import AYS_SD, GRIDS, karras
from latentdiff.diffusion.level import CLEAN, NoiseLevel
from latentdiff.diffusion.path import ByTokens, Straight, VariancePreserving, schedule_named
from latentdiff.diffusion.times import Times

SD = VariancePreserving.scaled_linear()


@pytest.mark.parametrize(
    ("t", "a", "snr", "ratio"),
    [
        (0, 0.99915, 1175.47059, 0.0291672),
        (100, 0.8942234776, 8.45389371, 0.3439312),
        (300, 0.5905010588, 1.44200876, 0.8327527),
        (700, 0.08252087061, 0.0899430493, 3.3343885),
        (999, 0.004660098513, 0.00468191671, 14.6146412),
    ],
)
def test_stable_diffusion_levels(t, a, snr, ratio):
    """betas = linspace(sqrt(.00085), sqrt(.012), 1000)^2; alpha^2 = prod(1 - beta); SNR = a / (1 - a)."""
    level = SD.level(t)
    assert level.alpha**2 == pytest.approx(a, rel=1e-9)
    assert level.snr == pytest.approx(snr, rel=1e-8)
    assert level.sigma / level.alpha == pytest.approx(ratio, abs=5e-8 * max(1, ratio))
    assert level.log_snr == pytest.approx(math.log(snr) / 2, rel=1e-8)


def test_linear_schedule():
    """Ho et al. 2020: betas = linspace(1e-4, 0.02, 1000)."""
    a = VariancePreserving.linear().alphas_cumprod
    assert a[500] == pytest.approx(0.07779665837, rel=1e-9)
    assert a[999] == pytest.approx(4.035829765e-05, rel=1e-9)
    assert math.sqrt(1 / a[999] - 1) == pytest.approx(157.407281, rel=1e-8)


def test_cosine_schedule():
    """f(t) = cos^2((t / T + s) / (1 + s) pi / 2), s = 0.008, beta <= 0.999."""
    schedule = VariancePreserving.cosine()
    assert schedule.betas[0] == pytest.approx(4.128422e-05, rel=1e-6)
    assert schedule.alphas_cumprod[500] == pytest.approx(0.4922851724, rel=1e-9)
    assert schedule.alphas_cumprod[999] == pytest.approx(2.428766907e-09, rel=1e-6)


def test_sigmoid_schedule():
    """alphas_cumprod[t] = (f(u) - f(3)) / (f(-3) - f(3)), f(u) = 1 / (1 + e^u), u = -3 + 6 (t + 1) / T."""

    def f(u):
        return 1 / (1 + math.exp(u))

    a = VariancePreserving.sigmoid().alphas_cumprod
    for t in (0, 250, 499, 900):
        expected = (f(-3 + 6 * (t + 1) / 1000) - f(3)) / (f(-3) - f(3))
        assert a[t] == pytest.approx(expected, rel=1e-9)
    assert a[499] == pytest.approx(0.5, rel=1e-9)  # f is odd about 0


@pytest.mark.parametrize(
    ("schedule", "last"),
    [(VariancePreserving.linear(), 0.006353), (SD, 0.068265), (VariancePreserving.cosine(), 4.928e-05)],
)
def test_terminal_signal(schedule, last):
    """sqrt(alphas_cumprod[T - 1]): Lin et al. 2023, table 1."""
    assert schedule.level(999).alpha == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(kind):
    """Lin et al. 2023, algorithm 1: the first alpha stays, the last is exactly 0, and roots are an affine map."""
    plain = schedule_named(kind, 1000)
    rescaled = plain.zero_terminal_snr()
    assert rescaled.alphas_cumprod[0] == plain.alphas_cumprod[0]
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.level(999).snr == 0
    assert rescaled.level(999).log_snr == -math.inf
    before, after = np.sqrt(plain.alphas_cumprod), np.sqrt(rescaled.alphas_cumprod)
    slopes = np.diff(after) / np.diff(before)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize("rescaled", [False, True])
def test_against_diffusers(kind, theirs, rescaled):
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}.get(kind, (1e-4, 0.02))
    scheduler = DDIMScheduler(
        beta_start=ends[0], beta_end=ends[1], beta_schedule=theirs, rescale_betas_zero_snr=rescaled
    )
    ours = schedule_named(kind, 1000)
    ours = ours.zero_terminal_snr() if rescaled else ours
    np.testing.assert_allclose(ours.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("spacing", "times"),
    [
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("leading_zero", [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_grids_of_ten(spacing, times):
    """Lin et al. 2023, table 2, counted from 0."""
    levels = SD.levels(10, spacing)
    assert [level.t for level in levels[:-1]] == times
    assert levels[-1] == CLEAN


def test_karras_levels():
    """Karras et al. 2022, eq. 5: N = 18, 0.002 to 80, rho 7."""
    sigmas = karras(18, 0.002, 80)
    np.testing.assert_allclose(sigmas[:4], [80, 57.5859847, 40.7855738, 28.3745846], rtol=1e-8)
    np.testing.assert_allclose(sigmas[-2:], [0.00752801996, 0.002], rtol=1e-8)


def test_exponential_levels_are_even_in_log_snr():
    log_snrs = [level.log_snr for level in SD.levels(30, "exponential")[:-1]]
    np.testing.assert_allclose(np.diff(log_snrs), (log_snrs[-1] - log_snrs[0]) / 29, rtol=1e-9)
    assert log_snrs[0] == pytest.approx(SD.level(999).log_snr)
    assert log_snrs[-1] == pytest.approx(SD.level(0).log_snr)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("terminal", [False, True])
def test_grids_descend(spacing, steps, terminal):
    schedule = VariancePreserving.cosine()
    schedule = schedule.zero_terminal_snr() if terminal else schedule
    levels = schedule.levels(steps, spacing)
    assert len(levels) == steps + 1
    assert all(a.log_snr < b.log_snr and a.t > b.t for a, b in itertools.pairwise(levels))
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12) for level in levels)


def test_level_between_whole_times_lies_between_them():
    low, middle, high = SD.level(400), SD.level(400.5), SD.level(401)
    assert math.atan2(middle.sigma, middle.alpha) == pytest.approx(
        (math.atan2(low.sigma, low.alpha) + math.atan2(high.sigma, high.alpha)) / 2, rel=1e-12
    )


@pytest.mark.parametrize("call", [lambda: SD.levels(0), lambda: SD.levels(1001), lambda: SD.level(1000)])
def test_out_of_range_is_refused(call):
    with pytest.raises(ValueError, match="must be from"):
        call()


def test_rising_signal_is_refused():
    with pytest.raises(ValueError, match="decrease strictly"):
        VariancePreserving(np.array([0.5, 0.6]))


# straight paths


def test_straight_levels():
    """alpha = 1 - t / T, sigma = t / T; a ratio r is s = r / (1 + r)."""
    path = Straight()
    assert path.level(250) == NoiseLevel(250.0, 0.75, 0.25)
    level = path.level_of(3.0)
    assert (level.t, level.alpha, level.sigma) == pytest.approx((750, 0.25, 0.75))
    alpha, sigma = path.scales(np.array([0.5, 999.5]))
    np.testing.assert_allclose((alpha, sigma), ((0.9995, 0.0005), (0.0005, 0.9995)))


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.5, 1.0, 3.0])
def test_shift(shift):
    """Esser et al. 2024, eq. 23: s' = shift s / (1 + (shift - 1) s), of grids and of training times alike."""
    path, plain = Straight(shift), Straight()
    s = np.array([level.sigma for level in plain.levels(10)])
    expected = shift * s / (1 + (shift - 1) * s)
    np.testing.assert_allclose([level.sigma for level in path.levels(10)], expected, rtol=1e-12)
    np.testing.assert_allclose(path.shifted(s), expected)
    assert path.levels(4)[0] == path.levels(4, "linspace")[0] == NoiseLevel(1000.0, 0.0, 1.0)


def test_a_shift_that_grows_with_the_tokens():
    """diffusers' dynamic shifting: mu linear in the tokens from 0.5 at 256 to 1.15 at 4096, shift e^mu."""
    path = Straight(math.exp(0.5), ByTokens(256, 0.5, 4096, 1.15))
    assert path.shift_of(256) == pytest.approx(math.exp(0.5))
    assert path.shift_of(4096) == pytest.approx(math.exp(1.15))
    assert path.shift_of(1024) == pytest.approx(math.exp(0.5 + 0.65 * 768 / 3840))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=0.5 + 0.65 * 768 / 3840)
    sigmas = [level.sigma for level in path.levels(6, tokens=1024)]
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=1e-6)


KINDS = {"straight": Straight(), "shifted": Straight(3.0), "SD": SD, "terminal": SD.zero_terminal_snr()}


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("path", KINDS)
def test_every_grid_descends(path, steps, spacing):
    levels = KINDS[path].levels(steps, spacing)
    assert len(levels) == steps + 1
    assert all(a.log_snr < b.log_snr and a.t > b.t for a, b in itertools.pairwise(levels))


# the newer grids


def test_align_your_steps_is_as_published():
    """Sabour et al. 2024, ten steps: within a few thousandths, for the path ends at 14.6146 and 0.02917."""
    ratios = [level.ratio for level in SD.levels(10, "align_your_steps")[:-1]]
    np.testing.assert_allclose(ratios, AYS_SD[:-1], rtol=5e-3)
    ratios = [level.ratio for level in SD.levels(20, "align_your_steps")[:-1]]
    assert ratios[1] == pytest.approx(math.sqrt(14.615 * 6.475), rel=2e-3), "log-linear between the published levels"
    ratios = [level.ratio for level in SD.levels(10, "align_your_steps_xl")[:-1]]
    assert ratios[3] == pytest.approx(2.181, rel=2e-3)


def test_beta_grid_is_of_quantiles():
    """Lee et al. 2024: the share of times below t is the distribution function of Beta(0.6, 0.6)."""
    times = np.array([level.t for level in SD.levels(20, "beta")[:-1]])
    np.testing.assert_allclose(stats.beta(0.6, 0.6).cdf(times / 999), 1 - np.arange(20) / 20, atol=1e-9)


def test_sgm_uniform_leaves_out_the_first_time():
    assert [level.t for level in SD.levels(3, "sgm_uniform")[:-1]] == pytest.approx([999, 666, 333])


# training times


def test_logit_normal_times():
    """The median of s is sigmoid(mean), and log(s / (1 - s)) has the deviation that was asked for."""
    times = Times(Straight(), "logit_normal", mean=0.4, std=0.8)
    t = np.array([times.draw(np.random.default_rng(n)) for n in range(20_000)]) / 1000
    logits = np.log(t / (1 - t))
    assert logits.mean() == pytest.approx(0.4, abs=0.02)
    assert logits.std() == pytest.approx(0.8, rel=0.02)


def test_continuous_times_cover_the_path():
    t = np.array([Times(Straight()).draw(np.random.default_rng(n)) for n in range(5000)])
    assert 0 < t.min() < 1
    assert 999 < t.max() <= 1000
    assert np.histogram(t, 10, (0, 1000))[0] == pytest.approx(np.full(10, 500), abs=5 * 500**0.5)


@pytest.mark.parametrize("path", [Straight(), SD], ids=["straight", "SD"])
def test_bins_of_a_validation(path):
    times = Times(path, bins=4)
    t = np.array([times.draw(np.random.default_rng(n), n) for n in range(400)])
    assert (np.minimum(t // 250, 3) == np.arange(400) % 4).all()
    with pytest.raises(ValueError, match="bins require"):
        Times(path, "log_normal", bins=4)
