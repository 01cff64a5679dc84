"""The forward process and its posterior, between any two noise levels s (less noise) and t (more).

    q(x_t | x0)      = N(alpha_t x0, sigma_t^2)                                 Ho et al. 2020, eq. 4
    q(x_t | x_s)     = N(alpha_ts x_s, beta_ts)                                 eq. 2 when s = t - 1
    q(x_s | x_t, x0) = N(mean, beta-tilde)                                      eq. 6 and 7 when s = t - 1

with alpha_ts = alpha_t / alpha_s and beta_ts = sigma_t^2 - alpha_ts^2 sigma_s^2 (Kingma et al. 2021, appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentdiff.diffusion.level import NoiseLevel

Array = Any  # numpy or torch; every operation here is one that both have


@dataclass(frozen=True)
class Transition:
    """The coefficients of the steps between two levels."""

    alpha: float  # alpha_ts, of q(x_t | x_s)
    beta: float  # beta_ts, its variance: the "large" variance of a reverse step, sigma_t^2 = beta_t
    x_t: float  # posterior mean = x_t * x_t-coefficient + x0 * x0-coefficient
    x0: float
    variance: float  # beta-tilde, the "small" variance of a reverse step


def transition(s: NoiseLevel, t: NoiseLevel) -> Transition:
    """Coefficients between s and t; s may be CLEAN, and alpha_t may be 0."""
    alpha = t.alpha / s.alpha
    beta = t.sigma**2 - (alpha * s.sigma) ** 2
    kept = s.sigma**2 / t.sigma**2
    return Transition(alpha, beta, alpha * kept, s.alpha * beta / t.sigma**2, beta * kept)


def diffuse(x0: Array, noise: Array, level: NoiseLevel) -> Array:
    """Closed-form jump: a sample of q(x_t | x0)."""
    return level.alpha * x0 + level.sigma * noise


def diffuse_step(x_s: Array, noise: Array, s: NoiseLevel, t: NoiseLevel) -> Array:
    """One Markov step: a sample of q(x_t | x_s)."""
    step = transition(s, t)
    return step.alpha * x_s + step.beta**0.5 * noise


def posterior_mean(x_t: Array, x0: Array, s: NoiseLevel, t: NoiseLevel) -> Array:
    """The mean of q(x_s | x_t, x0)."""
    step = transition(s, t)
    return step.x_t * x_t + step.x0 * x0
