"""Samplers: each walks a descending list of levels and yields every step.

All are written with x0 from the denoiser, so that every coefficient is finite from alpha = 0 to sigma = 0:
the exact solution of the linear part of the probability-flow ODE between levels t and s is

    x_s = r x_t + (alpha_s - r alpha_t) x0,    r = sigma_s / sigma_t,    for constant x0

(Song et al. 2021; Lu et al. 2022, prop. 3.1), and the samplers differ in the x0 they put there and in added noise.
They run on NumPy arrays and torch tensors alike. `noise(number)` gives the standard normal draw of a step, shaped
like x; samplers that add none ignore it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from latentdiff.diffusion.parametrization import Array, Denoiser
from latentdiff.diffusion.path import NoiseLevel
from latentdiff.diffusion.process import posterior_mean, transition

Levels = Sequence[NoiseLevel]
Noise = Callable[[int], Array]


class Step(NamedTuple):
    """A step made: its number (from 1), the level reached, x there, and the x0 that led there."""

    number: int
    level: NoiseLevel
    x: Array
    x0: Array


class Sampler(Protocol):
    """Walks `levels` from x at levels[0], yielding len(levels) - 1 steps."""

    def __call__(self, denoise: Denoiser, x: Array, levels: Levels, noise: Noise) -> Iterator[Step]:
        """See the class."""
        ...


def silent(number: int) -> Array:
    """No noise: for samplers that add none."""
    return 0.0


def _towards(x: Array, x0: Array, t: NoiseLevel, s: NoiseLevel) -> Array:
    """The step of the module's equation."""
    r = s.sigma / t.sigma
    return r * x + (s.alpha - r * t.alpha) * x0


def ddpm(denoise: Denoiser, x: Array, levels: Levels, noise: Noise, *, variance: str = "small") -> Iterator[Step]:
    """Ancestral sampling of the posterior (Ho et al. 2020, algorithm 2), on any grid.

    `variance` "small" is beta-tilde, "large" is beta; the step onto CLEAN adds no noise.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        x = posterior_mean(x, x0, s, t)
        if s.sigma > 0:
            step = transition(s, t)
            x = x + math.sqrt(step.variance if variance == "small" else step.beta) * noise(number)
        yield Step(number, s, x, x0)


def ddim(denoise: Denoiser, x: Array, levels: Levels, noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 is DDPM with the small variance."""
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        eps = (x - t.alpha * x0) / t.sigma
        added = eta * math.sqrt(transition(s, t).variance)
        x = s.alpha * x0 + math.sqrt(max(s.sigma**2 - added**2, 0.0)) * eps
        if added > 0:
            x = x + added * noise(number)
        yield Step(number, s, x, x0)


def euler(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent) -> Iterator[Step]:
    """Euler's method in sigma / alpha for x / alpha, d(x/alpha)/d(sigma/alpha) = (x/alpha - x0) / (sigma/alpha)
    (Karras et al. 2022, eq. 3); it equals DDIM.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        x = _towards(x, x0, t, s)
        yield Step(number, s, x, x0)


def euler_ancestral(denoise: Denoiser, x: Array, levels: Levels, noise: Noise, *, eta: float = 1.0) -> Iterator[Step]:
    """An Euler step to below the next level, then noise back up to it; with eta 1 it equals DDPM, small variance.

    With rho = sigma / alpha, variance eta^2 rho_s^2 (1 - rho_s^2 / rho_t^2) is added at s.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        up = min(eta * math.sqrt(transition(s, t).variance), s.sigma)
        down = NoiseLevel(s.t, s.alpha, math.sqrt(s.sigma**2 - up**2))
        x = _towards(x, x0, t, down)
        if up > 0:
            x = x + up * noise(number)
        yield Step(number, s, x, x0)


def heun(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent) -> Iterator[Step]:
    """Second order by two evaluations a step: the mean of x0 at both ends (Karras et al. 2022, algorithm 1, in
    exponential form, which is finite at alpha = 0). The step onto CLEAN takes one evaluation.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        if s.sigma > 0:
            x0 = 0.5 * (x0 + denoise(_towards(x, x0, t, s), s))
        x = _towards(x, x0, t, s)
        yield Step(number, s, x, x0)


def _extrapolation(before: NoiseLevel | None, t: NoiseLevel, s: NoiseLevel) -> float:
    """H / (2 h_before) of a two-step method, h in log-SNR: 0 (first order) where a step has no finite length."""
    if before is None or before.alpha == 0 or s.sigma == 0:
        return 0.0
    return (s.log_snr - t.log_snr) / (2 * (t.log_snr - before.log_snr))


def dpmpp_2m(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2023, algorithm 2): x0 extrapolated to the middle of the step from two levels."""
    before, x0_before = None, None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        ahead = _extrapolation(before, t, s)
        x = _towards(x, x0 + ahead * (x0 - x0_before) if ahead else x0, t, s)
        before, x0_before = t, x0
        yield Step(number, s, x, x0)


def dpmpp_2m_sde(denoise: Denoiser, x: Array, levels: Levels, noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2023, eq. 20): as dpmpp_2m on the reverse SDE, midpoint form.

    x_s = r q x_t + alpha_s (1 - q^2) x0 + sigma_s sqrt(1 - q^2) noise,  q = exp(log-SNR_t - log-SNR_s).
    """
    before, x0_before = None, None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        ahead = _extrapolation(before, t, s)
        guess = x0 + ahead * (x0 - x0_before) if ahead else x0
        q = (s.sigma * t.alpha) / (s.alpha * t.sigma)
        x = (s.sigma / t.sigma) * q * x + s.alpha * (1 - q**2) * guess
        if s.sigma > 0:
            x = x + s.sigma * math.sqrt(1 - q**2) * noise(number)
        before, x0_before = t, x0
        yield Step(number, s, x, x0)


class _Knot(NamedTuple):
    """Where a UniPC step began: x and x0 there, x0's slope in log-SNR, and the log-SNR since the step before."""

    level: NoiseLevel
    x: Array
    x0: Array
    slope: Array
    gap: float


def unipc(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent) -> Iterator[Step]:
    """UniPC-2 with B2 (Zhao et al. 2023, algorithms 1 and 2): the predictor of dpmpp_2m, and a corrector that redoes
    each step with the x0 found at its end. One evaluation a step; the step onto CLEAN is not corrected.
    """
    last: _Knot | None = None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        slope, gap = 0.0, math.inf
        if last is not None:
            x = _corrected(last, x0, t)
            gap = t.log_snr - last.level.log_snr
            slope = (x0 - last.x0) / gap if math.isfinite(gap) else 0.0
        last = _Knot(t, x, x0, slope, gap)
        second_order = math.isfinite(gap) and s.sigma > 0
        x = _towards(x, x0 + 0.5 * (s.log_snr - t.log_snr) * slope if second_order else x0, t, s)
        yield Step(number, s, x, x0)


def _corrected(knot: _Knot, x0_end: Array, s: NoiseLevel) -> Array:
    """UniC: the step to s again, with x0 known at both ends and, from the second step on, before them.

    The weights solve [[1, 1], [r, 1]] (w_before, w_end) = (b_1, b_2) of the paper's theorem 3.1.
    """
    h = s.log_snr - knot.level.log_snr
    w_before, w_end = 0.0, 0.5
    if math.isfinite(knot.gap):
        B = math.expm1(-h)
        phi = -B / h - 1
        b_1, b_2 = phi / B, 2 * (-phi / h - 0.5) / B
        w_before = (b_1 - b_2) / (1 + knot.gap / h)
        w_end = b_1 - w_before
    slope = w_before * h * knot.slope if w_before else 0.0
    return _towards(knot.x, knot.x0 + slope + w_end * (x0_end - knot.x0), knot.level, s)


def lcm(denoise: Denoiser, x: Array, levels: Levels, noise: Noise) -> Iterator[Step]:
    """Consistency sampling (Luo et al. 2023, algorithm 3), for what was distilled to be drawn with in a few steps.

    To x0 at once, then noised to the next level. x0 is c_out x0 + c_skip x with the paper's boundary scalings of 10 t
    and 0.5: at time 0 it is x itself.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        scaled = 10 * t.t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        x0 = c_out * denoise(x, t) + c_skip * x
        x = s.alpha * x0
        if s.sigma > 0:
            x = x + s.sigma * noise(number)
        yield Step(number, s, x, x0)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "lcm": lcm,
}
