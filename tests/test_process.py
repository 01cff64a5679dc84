"""The forward process: composition of its steps, and Bayes' rule for its posterior."""

import itertools
import math

import numpy as np
import pytest

from latentdiff.diffusion.level import CLEAN
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.process import diffuse, diffuse_step, posterior_mean, transition

SD = VariancePreserving.scaled_linear()


def test_one_step_has_the_schedules_beta():
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)."""
    for t in (1, 500, 999):
        step = transition(SD.level(t - 1), SD.level(t))
        assert step.beta == pytest.approx(SD.betas[t], rel=1e-9)
        assert step.alpha == pytest.approx(math.sqrt(1 - SD.betas[t]), rel=1e-12)


def test_posterior_matches_ho():
    """Ho et al. 2020, eq. 7: the coefficients and beta-tilde in terms of betas and alphas_cumprod."""
    a, b = SD.alphas_cumprod, SD.betas
    for t in (1, 500, 999):
        step = transition(SD.level(t - 1), SD.level(t))
        assert step.x0 == pytest.approx(math.sqrt(a[t - 1]) * b[t] / (1 - a[t]), rel=1e-9)
        assert step.x_t == pytest.approx(math.sqrt(1 - b[t]) * (1 - a[t - 1]) / (1 - a[t]), rel=1e-9)
        assert step.variance == pytest.approx((1 - a[t - 1]) / (1 - a[t]) * b[t], rel=1e-9)


def test_posterior_is_bayes_rule():
    """Precision and mean of q(x_s | x_t, x0) from the product of q(x_t | x_s) and q(x_s | x0)."""
    s, t = SD.level(300), SD.level(700)
    step = transition(s, t)
    precision = step.alpha**2 / step.beta + 1 / s.sigma**2
    x_t, x0 = 0.3, -1.2
    mean = (step.alpha * x_t / step.beta + s.alpha * x0 / s.sigma**2) / precision
    assert step.variance == pytest.approx(1 / precision, rel=1e-12)
    assert posterior_mean(x_t, x0, s, t) == pytest.approx(mean, rel=1e-12)


def test_jump_equals_steps():
    """With the same x0, walking T Markov steps with no noise gives the jump's mean; variances add up to sigma^2."""
    levels = [SD.level(t) for t in range(1000)]
    x, variance = diffuse_step(1.0, 0.0, CLEAN, levels[0]), transition(CLEAN, levels[0]).beta
    for s, t in itertools.pairwise(levels):
        x = diffuse_step(x, 0.0, s, t)
        step = transition(s, t)
        variance = step.alpha**2 * variance + step.beta
    assert x == pytest.approx(diffuse(1.0, 0.0, levels[-1]), rel=1e-9)
    assert variance == pytest.approx(levels[-1].sigma ** 2, rel=1e-9)


def test_steps_from_pure_noise_are_finite():
    top = SD.zero_terminal_snr().level(999)
    s = SD.level(500)
    step = transition(s, top)
    assert (step.alpha, step.x_t, step.beta) == (0, 0, 1)
    assert step.x0 == pytest.approx(s.alpha)
    assert step.variance == pytest.approx(s.sigma**2)


def test_noisy_data_has_the_level_s_moments():
    level = SD.level(300)
    draws = np.random.default_rng(0).standard_normal(200_000)
    x = diffuse(2.0, draws, level)
    assert x.mean() == pytest.approx(2 * level.alpha, abs=0.01)
    assert x.std() == pytest.approx(level.sigma, rel=0.01)
