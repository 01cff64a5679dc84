"""The bound's terms against closed forms, its estimate against their sum, the probabilities of 8-bit values."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from latentdiff.diffusion.bound import (
    BIN,
    Terms,
    bits,
    discretised,
    errors_of,
    mean_and_error,
    noised,
    prior,
    proposal,
    sample_times,
)
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.process import transition

LINEAR, SD = VariancePreserving.linear(), VariancePreserving.scaled_linear()
SCHEDULES = {"linear": LINEAR, "SD": SD, "cosine": VariancePreserving.cosine(), "terminal": SD.zero_terminal_snr()}
SHORT = VariancePreserving.from_betas(np.linspace(0.02, 0.3, 12))


def mmse(schedule, s):
    """The least mean square error of x0 ~ N(0, s^2) from x_t, (T,)."""
    a = schedule.alphas_cumprod
    return s**2 * (1 - a) / (a * s**2 + 1 - a)


def gaussian(schedule, s, mean=0.0):
    """The exact denoiser of N(mean, s^2)."""

    def predict(x, times):
        a = schedule.alphas_cumprod[times].reshape(-1, *(1,) * (x.ndim - 1))
        if not isinstance(x, np.ndarray):
            a = torch.as_tensor(a).to(x)
        gain = a**0.5 * s**2 / (a * s**2 + 1 - a)
        return mean + gain * (x - a**0.5 * mean)

    return predict


def even(steps):
    """Levels evenly spaced in log-SNR."""
    return VariancePreserving(1 / (1 + np.exp(-np.linspace(14, -14, steps))))


@pytest.mark.parametrize(("schedule", "expected"), [(LINEAR, 9.7047e-06), (SD, 1.128e-03)])
def test_the_prior(schedule, expected):
    """KL(q(x_T | x0) || N(0, I)) in bits per dimension for E[x0^2] = 1/3."""
    x0 = np.full((2, 3, 5), math.sqrt(1 / 3)) * np.array([1, -1])[:, None, None]
    np.testing.assert_allclose(bits(prior(x0, schedule), 15), expected, rtol=5e-4)
    a = schedule.alphas_cumprod[-1]
    kl = 0.5 * (a / 3 + (1 - a) - 1 - math.log(1 - a))
    np.testing.assert_allclose(prior(x0, schedule), 15 * kl, rtol=1e-6)


def test_the_prior_at_zero_terminal_snr():
    assert (prior(np.ones((2, 3)), SCHEDULES["terminal"]) == 0).all()


@pytest.mark.parametrize(
    ("schedule", "s", "expected"),
    [(LINEAR, 0.5, 6.302444155), (LINEAR, 1.0, 7.314554033), (SD, 0.5, 4.514952458), (SD, 1.0, 5.525836292)],
)
def test_gaussian_data_in_closed_form(schedule, s, expected):
    """Data N(0, s^2) with the exact denoiser: denoising terms and prior."""
    terms = Terms.of(schedule)
    total = (terms.weight * mmse(schedule, s) + terms.constant)[1:].sum()
    last = prior(np.array([[s], [-s]]), schedule)[0]
    assert bits(total + last, 1) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_each_term_is_the_divergence_of_two_gaussians(schedule, variance):
    """KL by its own formula, for any prediction; at time 0 the density's logarithm."""
    terms, rng = Terms.of(schedule, variance), np.random.default_rng(0)
    for t in [1, 2, 17, 500, 997, 998, 999]:
        x0, result, x_t = rng.normal(size=(3, 6))
        step = transition(schedule.level(t - 1), schedule.level(t))
        own = step.variance if variance == "small" else step.beta
        apart = (step.x_t * x_t + step.x0 * x0) - (step.x_t * x_t + step.x0 * result)
        kl = math.log(math.sqrt(own / step.variance)) + (step.variance + apart**2) / (2 * own) - 0.5
        squared = np.array([((x0 - result) ** 2).sum()])
        np.testing.assert_allclose(terms.at(np.array([t]), squared, 6), kl.sum(), rtol=1e-9)
    x0, result = rng.normal(size=(2, 6)) * 0.1
    density = stats.norm(result, math.sqrt(schedule.betas[0])).logpdf(x0).sum()
    squared = np.array([((x0 - result) ** 2).sum()])
    np.testing.assert_allclose(terms.at(np.array([0]), squared, 6), -density, rtol=1e-9)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_bound_is_above_the_entropy_and_near_it(s):
    """By many small steps a Gaussian's bound is its entropy, the least that there can be."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)

    def gap(steps):
        schedule = even(steps)
        terms = Terms.of(schedule)
        last = prior(np.array([[s]]), schedule)[0]
        return (terms.weight * mmse(schedule, s) + terms.constant).sum() + last - entropy

    gaps = [gap(steps) for steps in (500, 1000, 2000)]
    assert 0 < gaps[2] < gaps[1] < gaps[0] < 0.5
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05), "of order 1 in the steps"
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_scaled_data():
    """Data k times as large has a density k times as thin: the bound grows by log k, to what the steps leave."""
    schedule = even(4000)
    terms = Terms.of(schedule)

    def total(s):
        return (terms.weight * mmse(schedule, s) + terms.constant).sum() + prior(np.array([[s]]), schedule)[0]

    assert total(1.0) - total(0.5) == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_estimate(kind, variance):
    """Monte Carlo within three standard errors of the closed form, term by term."""
    s, schedule, dimensions = 0.7, SD, 16
    x0 = kind(np.random.default_rng(1).normal(0, s, (400, 4, 2, 2)))
    result = errors_of(gaussian(schedule, s), x0, schedule, count=8, seed=3)
    terms = Terms.of(schedule, variance)
    each = terms.weight * mmse(schedule, s) + terms.constant
    a = schedule.alphas_cumprod[-1]
    last = 0.5 * (a * (s**2 - 1) - math.log1p(-a))
    expected = dimensions * np.array([last, each[1:].sum(), each[0]])
    for got, wanted in zip((result.prior, result.denoising(variance), result.reconstruction), expected, strict=True):
        mean, error = mean_and_error(got)
        assert abs(mean - wanted) < 3 * error + 1e-9
        assert error < 0.02 * abs(wanted) + 1e-3
    mean, error = mean_and_error(result.total(variance))
    assert abs(mean - expected.sum()) < 3 * error
    edges = [1, 50, 200, 600, 1000]
    bins = [dimensions * each[a:b].mean() for a, b in pairwise(edges)]
    np.testing.assert_allclose(result.curve(edges, variance), bins, rtol=0.15)


def test_what_captions_are_worth():
    """Two classes, N(-1, s^2) and N(1, s^2): the bounds with the class known and not, by quadrature and by draws.

    The difference is the class's information, log 2, up to what few steps leave.
    """
    s, means = 0.3, np.array([-1.0, 1.0])

    def exact(schedule, mean):
        return gaussian(schedule, s, mean)

    def mixture(schedule, x, times):
        a = schedule.alphas_cumprod[times].reshape(-1, *(1,) * (x.ndim - 1))
        weights = [np.exp(-((x - a**0.5 * m) ** 2) / (2 * (a * s**2 + 1 - a))) for m in means]
        parts = [exact(schedule, m)(x, times) for m in means]
        return sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)

    def squared_error(schedule, t):
        """E |x0 - E[x0 | x_t]|^2 over x0 and noise; the two classes are mirror images."""
        a = schedule.alphas_cumprod[t]
        x = np.linspace(-8, 8, 8001)[:, None]  # of smooth integrands that end at 0, sums are exact integrals
        of, spread = np.full(len(x), t), a * s**2 + 1 - a
        off = exact(schedule, 1.0)(x, of) - mixture(schedule, x, of)
        density = stats.norm(a**0.5, math.sqrt(spread)).pdf(x)
        return (density * (s**2 * (1 - a) / spread + off**2)).sum() * 16 / 8000

    def both(schedule):
        terms = Terms.of(schedule)
        known = terms.weight * mmse(schedule, s) + terms.constant
        return known, terms.weight * [squared_error(schedule, t) for t in range(schedule.T)] + terms.constant

    known, unknown = both(SHORT)
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 3000)
    x0 = (means[labels] + s * rng.normal(size=3000))[:, None]
    cond = errors_of(lambda x, t: exact(SHORT, means[labels][:, None])(x, t), x0, SHORT, count=6)
    uncond = errors_of(partial(mixture, SHORT), x0, SHORT, count=6)
    for result, expected in ((cond, known), (uncond, unknown)):
        for got, wanted in ((result.denoising(), expected[1:].sum()), (result.reconstruction, expected[0])):
            mean, error = mean_and_error(got)
            assert abs(mean - wanted) < 3 * error
    mean, error = mean_and_error(uncond.total() - cond.total())
    assert abs(mean - (unknown - known).sum()) < 3 * error
    assert mean > 10 * error, "captions lower it"
    known, unknown = both(even(300))
    assert (unknown - known).sum() == pytest.approx(math.log(2), abs=0.05)


def test_draws_are_keyed():
    """A sample's do not depend on its batch, nor on the model: two are compared on the same ones."""
    x0 = np.random.default_rng(0).normal(size=(5, 3))
    whole = errors_of(gaussian(SD, 1.0), x0, SD, count=4, seed=1)
    part = errors_of(gaussian(SD, 1.0), x0[2:4], SD, count=4, seed=1, samples=[2, 3])
    assert np.array_equal(whole.times[2:4], part.times)
    np.testing.assert_array_equal(whole.squared[2:4], part.squared)
    another = errors_of(lambda x, t: 0 * x, x0, SD, count=4, seed=1)
    assert np.array_equal(whole.times, another.times)
    times = np.array([3, 3, 700, 0, 999])
    x = noised(SD, x0, times, 1, range(5))
    a = SD.alphas_cumprod[times][:, None]
    noise = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    assert abs(noise).max() < 5
    assert not np.allclose(noise[0], noise[1])
    assert not np.array_equal(whole.times, errors_of(gaussian(SD, 1.0), x0, SD, count=4, seed=2).times)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_times_are_drawn_as_proposed(schedule):
    """All but the first, by their probabilities; none so seldom that one draw weighs without bound."""
    p = proposal(schedule)
    assert p[0] == 0
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p[1:].min() > 0.09 / schedule.T
    picture = np.concatenate([sample_times(p, 50, 0, sample) for sample in range(400)])
    counts = np.histogram(picture, [1, 10, 100, 300, 600, 999, 1000])[0] / len(picture)
    edges = np.cumsum(np.concatenate([[0], p]))
    expected = [edges[b] - edges[a] for a, b in ((1, 10), (10, 100), (100, 300), (300, 600), (600, 999), (999, 1000))]
    np.testing.assert_allclose(counts, expected, atol=0.004)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_probabilities_of_8_bit_values(kind):
    """Over all 256 they sum to 1; each is the density's integral over its bin; far out nothing is lost."""
    values = np.arange(256) / 127.5 - 1
    density = {"gaussian": stats.norm, "laplace": stats.laplace}[kind]
    for mean, scale in ((0.1, 0.03), (-1.2, 0.3), (0.999, 0.002), (0.0, 5.0)):
        logs = discretised(values, np.full(256, mean), scale, kind)
        assert np.exp(logs).sum() == pytest.approx(1, abs=1e-12)
        of = density(mean, scale)
        low, high = values - BIN / 2, values + BIN / 2
        low[0], high[-1] = -np.inf, np.inf
        np.testing.assert_allclose(np.exp(logs), of.cdf(high) - of.cdf(low), atol=1e-13)
    far = discretised(np.array([1.0 - BIN, -1.0 + BIN]), np.array([-1.0, 1.0]), 0.01, kind)
    assert far[0] == pytest.approx(far[1], rel=1e-9)
    at_its_edge = (2 - BIN - BIN / 2) / 0.01
    expected = stats.norm.logsf(at_its_edge) if kind == "gaussian" else -at_its_edge - math.log(2)
    if kind == "laplace":
        expected += math.log1p(-math.exp(-BIN / 0.01))
    assert far[0] == pytest.approx(expected, rel=1e-9 if kind == "laplace" else 1e-6)


def test_pixels():
    """The reconstruction of 8-bit values is that of their bins, beside it the same terms."""
    x0 = np.random.default_rng(0).integers(0, 256, (6, 2, 4)) / 127.5 - 1
    result = errors_of(gaussian(LINEAR, 1.0), x0, LINEAR, count=2, pixels=True)
    plain = errors_of(gaussian(LINEAR, 1.0), x0, LINEAR, count=2)
    assert np.array_equal(result.squared, plain.squared)
    x = noised(LINEAR, x0, np.zeros(6, np.int64), 0, range(6))
    logs = discretised(x0, gaussian(LINEAR, 1.0)(x, np.zeros(6, np.int64)), math.sqrt(1e-4))
    np.testing.assert_allclose(result.reconstruction, -logs.reshape(6, -1).sum(1), rtol=1e-12)
    assert bits(result.reconstruction, 8).mean() < 8


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown variance 'medium'; one of small, large"):
        Terms.of(SD, "medium")


# on a straight path


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_a_straight_path_in_closed_form(s):
    """Data N(0, s^2) with the exact denoiser on the levels 1 .. T of a rectified flow: each denoising term by the KL of
    two Gaussians, summed; there is no prior, for the last level is pure noise.
    """
    path = Straight(T=200)
    levels = [path.numbered(n) for n in range(path.T)]
    total = 0.0
    for below, level in pairwise(levels):
        step = transition(below, level)
        mmse = s**2 * level.sigma**2 / (level.alpha**2 * s**2 + level.sigma**2)
        total += step.x0**2 * mmse / (2 * step.variance)
    terms = Terms.of(path)
    alpha, sigma = path.scales(np.arange(1.0, 201.0))
    ours = (terms.weight * s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2) + terms.constant)[1:].sum()
    assert ours == pytest.approx(total, rel=1e-10)
    assert (prior(np.ones((2, 3)), path) == 0).all()
    # with ever more levels the sum goes to half the integral of the change of SNR times the MMSE (Kingma et al. 2021)
    u = np.linspace(math.log(levels[-2].snr), math.log(levels[0].snr), 200_001)
    integral = np.trapezoid(0.5 * np.exp(u) * s**2 / (np.exp(u) * s**2 + 1), u)
    fine = Straight(T=20_000)
    alpha, sigma = fine.scales(np.arange(1.0, 20_001.0))
    inside = (alpha / np.maximum(sigma, 1e-300)) ** 2
    chosen = (inside >= levels[-2].snr) & (inside <= levels[0].snr)
    many = (Terms.of(fine).weight * s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2))[chosen].sum()
    assert many == pytest.approx(integral, rel=0.02)


def test_the_estimate_on_a_straight_path():
    """Drawn times against every time, with the exact denoiser of N(0.3, 0.25)."""
    path, rng = Straight(T=40), np.random.default_rng(0)
    x0 = rng.normal(0.3, 0.5, (400, 6))

    def predict(x, numbers):
        alpha, sigma = (each[:, None] for each in path.scales(numbers + 1.0))
        variance = alpha**2 * 0.25 + sigma**2
        return 0.3 + alpha * 0.25 / variance * (x - alpha * 0.3)

    errors = errors_of(predict, x0, path, count=16)
    mean, error = mean_and_error(errors.denoising() / 6)
    alpha, sigma = path.scales(np.arange(1.0, 41.0))
    exact = (Terms.of(path).weight * 0.25 * sigma**2 / (alpha**2 * 0.25 + sigma**2))[1:].sum()
    assert abs(mean - exact) < 4 * error
