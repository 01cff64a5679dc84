"""Guidance on Gaussians, where the guided distribution is known in closed form."""

import math

import numpy as np
import pytest
import torch

from latentdiff.diffusion import guidance, samplers
from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.path import Straight, VariancePreserving

SD = VariancePreserving.scaled_linear()


def gaussian(mean, std):
    def denoise(x, level):
        variance = level.alpha**2 * std**2 + level.sigma**2
        return mean + level.alpha * std**2 / variance * (x - level.alpha * mean)

    return denoise


def pair(uncond, cond):
    return lambda x, level: np.stack([uncond(x, level), cond(x, level)])


def fine_grid(steps=4000):
    """From the last time of SD's schedule to where sigma / alpha is 1e-4, even in log-SNR."""
    return [
        NoiseLevel(0.0, (1 + math.exp(-2 * s)) ** -0.5, (1 + math.exp(2 * s)) ** -0.5)
        for s in np.linspace(SD.level(999).log_snr, math.log(1e4), steps + 1)
    ]


def mapped(denoise, x):
    *_, step = samplers.dpmpp_2m(denoise, np.array(x), fine_grid())
    return step.x


def test_equal_variances_move_the_mean():
    """cond N(m1, s^2), uncond N(m0, s^2): the score of the guided density is that of N(m0 + w (m1 - m0), s^2)."""
    m0, m1, s, w = -0.3, 0.5, 0.4, 3.0
    guided = guidance.classifier_free(pair(gaussian(m0, s), gaussian(m1, s)), w)
    x = np.linspace(-2, 2, 5)
    np.testing.assert_allclose(mapped(guided, x), mapped(gaussian(m0 + w * (m1 - m0), s), x), rtol=1e-9)


@pytest.mark.parametrize(("w", "std"), [(1, 0.4997076), (2, 0.2502916), (7.5, 0.00558422)])
def test_zero_means_shrink(w, std):
    """cond 0.5, uncond 1: x is scaled by (factor of cond)^w (factor of uncond)^(1 - w) along the flow, starting from
    x / alpha ~ N(0, rho^2), rho = 14.614641; the factor of N(0, s^2) is s / sqrt(s^2 + rho^2) for x / alpha."""
    rho = SD.level(999).sigma / SD.level(999).alpha
    factor = (0.5 / math.hypot(0.5, rho)) ** w * (1 / math.hypot(1, rho)) ** (1 - w)
    assert rho * factor == pytest.approx(std, rel=1e-6)
    guided = guidance.classifier_free(pair(gaussian(0.0, 1.0), gaussian(0.0, 0.5)), w)
    assert mapped(guided, [SD.level(999).sigma])[0] == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize(("terminal", "shrink"), [(False, 0.0341923), (True, 0.0)])
def test_mean_lost_by_starting_from_noise(terminal, shrink):
    """N(mu, s^2) sampled from N(0, 1) at a_T > 0 ends sqrt(a_T) s / sqrt(a_T s^2 + 1 - a_T) of mu short."""
    schedule = SD.zero_terminal_snr() if terminal else SD
    mu, s = 2.0, 0.5
    top = schedule.level(999)
    assert top.alpha * s / math.hypot(top.alpha * s, top.sigma) == pytest.approx(shrink, abs=1e-7)
    levels = [top, *fine_grid()] if terminal else fine_grid()
    *_, step = samplers.dpmpp_2m(gaussian(mu, s), np.zeros(1), levels)
    assert 1 - step.x[0] / mu == pytest.approx(shrink, abs=2e-5)


def test_scale_one_is_conditional_and_zero_unconditional():
    uncond, cond = gaussian(0.0, 1.0), gaussian(1.0, 0.5)
    x, level = np.linspace(-1, 1, 5), SD.level(300)
    np.testing.assert_allclose(guidance.classifier_free(pair(uncond, cond), 1)(x, level), cond(x, level))
    np.testing.assert_allclose(guidance.classifier_free(pair(uncond, cond), 0)(x, level), uncond(x, level))


@pytest.mark.parametrize("library", [np, torch])
def test_rescaled_has_the_conditional_deviation(library):
    """Lin et al. 2023, eq. 15-16: share 1 gives each picture cond's standard deviation, 0 plain guidance."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, 4, 5, 5))
    both_values = values if library is np else torch.from_numpy(values)
    level, x = SD.level(300), both_values[0]

    def both(x, level):
        return both_values

    guided, cond = guidance.classifier_free(both, 5.0), guidance.chosen(both, 1)
    plain = guided(x, level)
    full, half, none = (guidance.rescaled(guided, cond, share, "sample")(x, level) for share in (1.0, 0.5, 0.0))
    for picture in range(3):
        assert float(full[picture].std()) == pytest.approx(float(both_values[1][picture].std()), rel=1e-12)
    np.testing.assert_allclose(half, (plain + full) / 2, rtol=1e-12)
    np.testing.assert_allclose(none, plain, rtol=1e-12)


def test_within_guides_inside_the_interval_only():
    guided, plain = gaussian(1.0, 1.0), gaussian(0.0, 1.0)
    denoise = guidance.within(guided, plain, lowest=-1, highest=1)
    x = np.ones(3)
    for t, expected in ((999, plain), (300, guided), (0, plain)):
        np.testing.assert_array_equal(denoise(x, SD.level(t)), expected(x, SD.level(t)))


@pytest.mark.parametrize("kind", [np, torch])
def test_rescaling_what_is_constant_changes_nothing(kind):
    """An epsilon network at zero SNR predicts x0 = 0: no deviation to pull back to, and none is made up."""
    both = kind.zeros((2, 3, 1, 4, 4))
    guided = guidance.classifier_free(lambda x, level: both, 7.0)
    image = guidance.rescaled(guided, guidance.chosen(lambda x, level: both, 1), 0.7, "sample")(both[0], SD.level(5))
    assert (image == 0).all()


def test_one_evaluation_is_shared():
    """Wrappers around the same network ask it once a place; another x or level is another place."""
    times = []

    def both(x, level):
        times.append(level.t)
        return np.stack([0 * x, x])

    shared = guidance.once(both)
    guided = guidance.rescaled(guidance.classifier_free(shared, 3.0), guidance.chosen(shared, 1), 0.5, "sample")
    x = np.arange(8.0).reshape(1, 8)
    guided(x, SD.level(5))
    assert times == [5.0]
    guided(x.copy(), SD.level(5)), guided(x, SD.level(6))
    assert times == [5.0, 5.0, 6.0]


@pytest.mark.parametrize("library", [np, torch])
def test_apg_projects(library):
    """Sadat et al. 2024: eta 1 without a norm is plain guidance; eta 0 leaves nothing parallel to cond; the update is
    as long as the norm allows; with momentum b the k-th update of a constant difference is (1 - b^k) / (1 - b) it."""
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 5))
    values = values if library is np else torch.from_numpy(values)
    cond, x, level = values[1], values[0], SD.level(300)

    def both(x, level):
        return values

    def updates(scale=5.0, **settings):
        return (guidance.apg(both, scale, **settings)(x, level) - cond).reshape(3, -1)

    plain = (guidance.classifier_free(both, 5.0)(x, level) - cond).reshape(3, -1)
    np.testing.assert_allclose(updates(eta=1.0), plain, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose((updates() * cond.reshape(3, -1)).sum(1), 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(updates(eta=1.0, norm=2.5), axis=1), 4 * 2.5, rtol=1e-9)
    np.testing.assert_allclose(updates(eta=1.0, norm=1e6), plain, rtol=1e-9, atol=1e-9)
    moving = guidance.apg(both, 2.0, eta=1.0, momentum=-0.5)
    for k in (1, 2, 3):
        update = (moving(x, level) - cond).reshape(3, -1)
        np.testing.assert_allclose(update, plain / 4 * (1 - (-0.5) ** k) / 1.5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("library", [np, torch])
def test_thresholds_are_those_without_guidance(library):
    """Guided values 0..99 against 0..9.9: the 0.9 quantile 89 is brought to 8.9, what exceeds it too; a picture that
    is within its own bounds stays as it is."""
    line = np.arange(100.0)
    cond = np.stack([line / 10, line])
    image = np.stack([line, line / 2])
    if library is torch:
        cond, image = torch.from_numpy(cond), torch.from_numpy(image)
    denoise = guidance.thresholded(lambda x, level: image, lambda x, level: cond, 0.9)
    result = denoise(image, None)
    np.testing.assert_allclose(result[0], np.minimum(line, 89) / 10, rtol=1e-12)
    np.testing.assert_allclose(result[1], line / 2, rtol=1e-12)


def test_away_from_a_worse_network():
    """Against a wider Gaussian of the same mean it is guidance of scale 1 + s: one formula, two derivations."""
    cond, worse = gaussian(0.3, 0.5), gaussian(0.3, 1.0)
    x, level = np.linspace(-1, 1, 5), SD.level(300)
    away = guidance.away_from(cond, cond, worse, 2.0)(x, level)
    np.testing.assert_allclose(away, guidance.classifier_free(guidance.paired(worse, cond), 3.0)(x, level), rtol=1e-12)


@pytest.mark.parametrize("level", [SD.level(300), Straight().level(300), Straight().level(600)])
@pytest.mark.parametrize("observed", [-1.0, 2.0])
def test_steered_toward_an_observation(observed, level):
    """Data N(0, 1), y = x0 + N(0, r^2): the steered denoiser of scale 1, with the gradient of log p(y | x0) at the
    fixed point, is the exact posterior mean E[x0 | x_t, y] (both Gaussian)."""
    r, x = 0.7, np.linspace(-2, 2, 5)
    total = level.alpha**2 + level.sigma**2
    variance, mean = level.sigma**2 / total, level.alpha * x / total  # of x0 given x_t
    exact = (mean / variance + observed / r**2) / (1 / variance + 1 / r**2)
    steered = guidance.toward(gaussian(0.0, 1.0), lambda x0: (observed - exact) / r**2, 1.0)
    np.testing.assert_allclose(steered(x, level), exact, rtol=1e-9)


@pytest.mark.parametrize("library", [np, torch])
def test_steered_no_further_than_the_radius(library):
    """Root mean square of the change of each picture; a smaller change is left as it is."""
    gradient = library.ones((2, 4, 5, 5))
    gradient[1] *= 0.01
    x = library.zeros((2, 4, 5, 5))
    level = SD.level(999)
    moved = guidance.toward(lambda x, level: x, lambda x0: gradient, 1.0, radius=0.05)(x, level)
    result = [float((picture**2).mean()) ** 0.5 for picture in moved]
    assert result == pytest.approx([0.05, 0.01 * level.sigma**2], rel=1e-5)


def test_what_is_kept_walks_the_closed_form():
    """Started from alpha known + sigma noise, every level of a deterministic walk is the same mixture there; elsewhere
    it is what it is without."""
    known, noise = np.full(6, 0.8), np.linspace(-1, 1, 6)
    mask = np.array([0, 0, 0, 1, 1, 1])
    levels = SD.levels(7)
    start = levels[0].alpha * known + levels[0].sigma * noise
    free = list(samplers.ddim(gaussian(0.0, 0.5), start, levels, samplers.silent))
    denoise = guidance.keep(gaussian(0.0, 0.5), known, mask, levels)
    kept = list(samplers.ddim(denoise, start, levels, samplers.silent))
    for step, other in zip(kept, free, strict=True):
        expected = step.level.alpha * known + step.level.sigma * noise
        np.testing.assert_allclose(step.x[:3], expected[:3], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(step.x[3:], other.x[3:], rtol=1e-12)
    np.testing.assert_allclose(kept[-1].x[:3], known[:3])
