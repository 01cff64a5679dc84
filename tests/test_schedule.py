"""Schedules against their closed forms and against diffusers."""

import itertools
import math

import numpy as np
import pytest
from diffusers import DDIMScheduler

from latentdiff.diffusion.path import CLEAN, NoiseSchedule, karras, schedule_named

SD = NoiseSchedule.scaled_linear()


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
    a = NoiseSchedule.linear().alphas_cumprod
    assert a[500] == pytest.approx(0.07779665837, rel=1e-9)
    assert a[999] == pytest.approx(4.035829765e-05, rel=1e-9)
    assert math.sqrt(1 / a[999] - 1) == pytest.approx(157.407281, rel=1e-8)


def test_cosine_schedule():
    """f(t) = cos^2((t / T + s) / (1 + s) pi / 2), s = 0.008, beta <= 0.999."""
    schedule = NoiseSchedule.cosine()
    assert schedule.betas[0] == pytest.approx(4.128422e-05, rel=1e-6)
    assert schedule.alphas_cumprod[500] == pytest.approx(0.4922851724, rel=1e-9)
    assert schedule.alphas_cumprod[999] == pytest.approx(2.428766907e-09, rel=1e-6)


def test_sigmoid_schedule():
    """alphas_cumprod[t] = (f(u) - f(3)) / (f(-3) - f(3)), f(u) = 1 / (1 + e^u), u = -3 + 6 (t + 1) / T."""

    def f(u):
        return 1 / (1 + math.exp(u))

    a = NoiseSchedule.sigmoid().alphas_cumprod
    for t in (0, 250, 499, 900):
        expected = (f(-3 + 6 * (t + 1) / 1000) - f(3)) / (f(-3) - f(3))
        assert a[t] == pytest.approx(expected, rel=1e-9)
    assert a[499] == pytest.approx(0.5, rel=1e-9)  # f is odd about 0


@pytest.mark.parametrize(
    ("schedule", "last"),
    [(NoiseSchedule.linear(), 0.006353), (SD, 0.068265), (NoiseSchedule.cosine(), 4.928e-05)],
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


def test_uniform_levels_are_even_in_log_snr():
    log_snrs = [level.log_snr for level in SD.levels(30, "uniform")[:-1]]
    np.testing.assert_allclose(np.diff(log_snrs), (log_snrs[-1] - log_snrs[0]) / 29, rtol=1e-9)
    assert log_snrs[0] == pytest.approx(SD.level(999).log_snr)
    assert log_snrs[-1] == pytest.approx(SD.level(0).log_snr)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("terminal", [False, True])
def test_grids_descend(spacing, steps, terminal):
    schedule = NoiseSchedule.cosine()
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
        NoiseSchedule(np.array([0.5, 0.6]))
