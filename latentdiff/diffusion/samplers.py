"""Samplers: each walks a descending list of levels and yields every step.

All are written with x0 from the denoiser, so that every coefficient is finite from alpha = 0 to sigma = 0:
the exact solution of the linear part of the probability-flow ODE between levels t and s is

    x_s = r x_t + (alpha_s - r alpha_t) x0,    r = sigma_s / sigma_t,    for constant x0                        (1)

(Song et al. 2021; Lu et al. 2022, prop. 3.1), and the samplers differ in the x0 they put there and in the noise they
add. It holds on every path; on a straight one it is the Euler step of flow models. Samplers that are stated for
x / alpha over rho = sigma / alpha (Karras et al. 2022) take equation 1 where rho is infinite, at pure noise.

They run on NumPy arrays and torch tensors alike. `noise(number)` gives the standard normal draw of a step, shaped like
x; samplers that add none ignore it. `path` finds the levels between those of the list.

SAMPLERS at the end is the one table of them: a sampler is one function and one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Array, Denoiser, boundary
from latentdiff.diffusion.process import posterior_mean, transition

if TYPE_CHECKING:
    from latentdiff.diffusion.path import Path

Levels = Sequence[NoiseLevel]
Noise = Callable[[int], Array]


class Step(NamedTuple):
    """A step made: its number (from 1), the level reached, x there, and the x0 that led there."""

    number: int
    level: NoiseLevel
    x: Array
    x0: Array


class Walk(Protocol):
    """Walks `levels` from x at levels[0], yielding len(levels) - 1 steps.

    The caller may send another x, from which the walk continues.
    """

    def __call__(self, denoise: Denoiser, x: Array, levels: Levels, noise: Noise, path: Path) -> Iterator[Step]:
        """See the class."""
        ...


def _reached(number: int, level: NoiseLevel, x: Array, x0: Array) -> Generator[Step, Array | None, Array]:
    """Yield a step; returns x, or what was sent instead of it."""
    sent = yield Step(number, level, x, x0)
    return x if sent is None else sent


def silent(number: int) -> Array:
    """No noise: for samplers that add none."""
    return 0.0


def _towards(x: Array, x0: Array, t: NoiseLevel, s: NoiseLevel) -> Array:
    """Equation 1."""
    r = s.sigma / t.sigma
    return r * x + (s.alpha - r * t.alpha) * x0


def _below(t: NoiseLevel, s: NoiseLevel, eta: float) -> tuple[NoiseLevel, float]:
    """The level below s from which noise of the returned scale leads up to s.

    With rho = sigma / alpha, variance eta^2 rho_s^2 (1 - rho_s^2 / rho_t^2) is added at s (k-diffusion).
    """
    up = min(eta * math.sqrt(transition(s, t).variance), s.sigma)
    return NoiseLevel(s.t, s.alpha, math.sqrt(s.sigma**2 - up**2)), up


def _middle(t: NoiseLevel, s: NoiseLevel, path: Path) -> NoiseLevel | None:
    """The level halfway between two in log-SNR; None where one of them has no finite log-SNR."""
    if t.alpha == 0 or s.sigma == 0:
        return None
    return path.level_of(math.sqrt(t.ratio * s.ratio))


def ddpm(
    denoise: Denoiser,
    x: Array,
    levels: Levels,
    noise: Noise = silent,
    path: Path | None = None,
    *,
    variance: str = "small",
) -> Iterator[Step]:
    """Ancestral sampling of the posterior (Ho et al. 2020, algorithm 2), on any grid.

    `variance` "small" is beta-tilde, "large" is beta; the step onto CLEAN adds no noise.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        x = posterior_mean(x, x0, s, t)
        if s.sigma > 0:
            step = transition(s, t)
            x = x + math.sqrt(step.variance if variance == "small" else step.beta) * noise(number)
        x = yield from _reached(number, s, x, x0)


def ddim(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 is DDPM with the small variance."""
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        eps = (x - t.alpha * x0) / t.sigma
        added = eta * math.sqrt(transition(s, t).variance)
        x = s.alpha * x0 + math.sqrt(max(s.sigma**2 - added**2, 0.0)) * eps
        if added > 0:
            x = x + added * noise(number)
        x = yield from _reached(number, s, x, x0)


def euler(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """Euler's method in sigma / alpha for x / alpha, d(x/alpha)/d(sigma/alpha) = (x/alpha - x0) / (sigma/alpha)
    (Karras et al. 2022, eq. 3); it equals DDIM.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        x = _towards(x, x0, t, s)
        x = yield from _reached(number, s, x, x0)


def euler_ancestral(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """An Euler step to below the next level, then noise back up to it; with eta 1 it equals DDPM, small variance."""
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        down, up = _below(t, s, eta)
        x = _towards(x, x0, t, down)
        if up > 0:
            x = x + up * noise(number)
        x = yield from _reached(number, s, x, x0)


def heun(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, churn: float = 0.0
) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 1, and with churn (their S_churn) algorithm 2: second order by two evaluations.

    In y = x / alpha over rho = sigma / alpha: y_s = y + (rho_s - rho_t) (d_t + d_s) / 2, d = (y - x0) / rho. Churn
    first adds noise up to rho (1 + min(churn / steps, sqrt(2) - 1)). The steps from pure noise and onto CLEAN take
    one evaluation.
    """
    more = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for number, (t, s) in enumerate(pairwise(levels), 1):
        if more and t.alpha and path is not None:
            above = path.level_of(t.ratio * (1 + more))
            added = math.sqrt(above.ratio**2 - t.ratio**2)
            x, t = above.alpha * (x / t.alpha + added * noise(number)), above
        x0 = denoise(x, t)
        if t.alpha == 0 or s.sigma == 0:
            x = _towards(x, x0, t, s)
        else:
            y, slope = x / t.alpha, (x / t.alpha - x0) / t.ratio
            ahead = _towards(x, x0, t, s)
            slope_ahead = (ahead / s.alpha - denoise(ahead, s)) / s.ratio
            x = s.alpha * (y + (s.ratio - t.ratio) * 0.5 * (slope + slope_ahead))
        x = yield from _reached(number, s, x, x0)


def heun_exponential(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """Heun's method in exponential form: equation 1 with the mean of x0 at both ends.

    Second order by two evaluations a step; unlike `heun` also from alpha = 0. The step onto CLEAN takes one.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        if s.sigma > 0:
            x0 = 0.5 * (x0 + denoise(_towards(x, x0, t, s), s))
        x = _towards(x, x0, t, s)
        x = yield from _reached(number, s, x, x0)


def dpm2(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """DPM-Solver-2 as k-diffusion states it: the midpoint method in rho, with the midpoint in log rho.

    It is `dpm2_ancestral` without noise.
    """
    yield from dpm2_ancestral(denoise, x, levels, noise, path, eta=0.0)


def dpm2_ancestral(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """`dpm2` to below the next level, then noise up to it (k-diffusion, sample_dpm_2_ancestral)."""
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        down, up = _below(t, s, eta)
        middle = None if path is None else _middle(t, down, path)
        if middle is None:
            x = _towards(x, x0, t, down)
        else:
            halfway = _towards(x, x0, t, middle)
            slope = (halfway / middle.alpha - denoise(halfway, middle)) / middle.ratio
            x = down.alpha * (x / t.alpha + (down.ratio - t.ratio) * slope)
        if up > 0:
            x = x + up * noise(number)
        x = yield from _reached(number, s, x, x0)


def dpmpp_2s_ancestral(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2023, algorithm 1, r = 1/2) to below the next level, then noise up to it."""
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        down, up = _below(t, s, eta)
        middle = None if path is None else _middle(t, down, path)
        ahead = x0 if middle is None else denoise(_towards(x, x0, t, middle), middle)
        x = _towards(x, ahead, t, down)
        if up > 0:
            x = x + up * noise(number)
        x = yield from _reached(number, s, x, x0)


def dpmpp_sde(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """SDE-DPM-Solver++ with a step in between (k-diffusion, sample_dpmpp_sde, r = 1/2).

    The noise of the whole step and that of its first half are increments of one Brownian motion in rho, correlated by
    sqrt((rho_t - rho_m) / (rho_t - rho_s)); a step draws number 2 n - 1 and 2 n.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        middle = None if path is None else _middle(t, s, path)
        down, up = _below(t, s, eta)
        second = noise(2 * number) if up > 0 else 0.0
        ahead = x0
        if middle is not None:
            first = noise(2 * number - 1)
            below, back = _below(t, middle, eta)
            ahead = denoise(_towards(x, x0, t, below) + back * first, middle)
            shared = math.sqrt((t.ratio - middle.ratio) / (t.ratio - s.ratio))
            second = shared * first + math.sqrt(1 - shared**2) * second
        x = _towards(x, ahead, t, down)
        if up > 0:
            x = x + up * second
        x = yield from _reached(number, s, x, x0)


def _extrapolation(before: NoiseLevel | None, t: NoiseLevel, s: NoiseLevel) -> float:
    """H / (2 h_before) of a two-step method, h in log-SNR: 0 (first order) where a step has no finite length."""
    if before is None or before.alpha == 0 or s.sigma == 0:
        return 0.0
    return (s.log_snr - t.log_snr) / (2 * (t.log_snr - before.log_snr))


def dpmpp_2m(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2023, algorithm 2): x0 extrapolated to the middle of the step from two levels."""
    before, x0_before = None, None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        ahead = _extrapolation(before, t, s)
        x = _towards(x, x0 + ahead * (x0 - x0_before) if ahead else x0, t, s)
        before, x0_before = t, x0
        x = yield from _reached(number, s, x, x0)


def dpmpp_2m_sde(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
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
        x = yield from _reached(number, s, x, x0)


class _Knot(NamedTuple):
    """Where a UniPC step began: x and x0 there, x0's slope in log-SNR, and the log-SNR since the step before."""

    level: NoiseLevel
    x: Array
    x0: Array
    slope: Array
    gap: float


def unipc(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """UniPC-2 with B2 (Zhao et al. 2023, algorithms 1 and 2): the predictor of dpmpp_2m, and a corrector that redoes
    each step with the x0 found at its end. One evaluation a step; the step onto CLEAN is not corrected. An x that the
    caller sends acts only through its x0, as in diffusers, since the corrector redoes the step that led to it.
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
        x = yield from _reached(number, s, x, x0)


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


def lcm(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None) -> Iterator[Step]:
    """Consistency sampling (Luo et al. 2023, algorithm 3), for models that are distilled for few steps.

    A jump to x0, then noise up to the next level. x0 is c_out x0 + c_skip x with the paper's boundary scalings of 10 t
    and 0.5: at time 0 it is x itself.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        c_skip, c_out = boundary(t.t)
        x0 = c_out * denoise(x, t) + c_skip * x
        x = s.alpha * x0
        if s.sigma > 0:
            x = x + s.sigma * noise(number)
        x = yield from _reached(number, s, x, x0)


def dpmpp_3m_sde(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 1.0
) -> Iterator[Step]:
    """SDE-DPM-Solver++(3M) (k-diffusion, sample_dpmpp_3m_sde): x0 extrapolated by up to three levels.

    With h the step in log-SNR and k = (1 + eta) h: y_s = e^-k y + (1 - e^-k) x0 + phi_2 D1 - phi_3 D2,
    phi_2 = (e^-k - 1) / k + 1, phi_3 = phi_2 / k - 1/2, D1 and D2 divided differences of x0. As published: order 3
    would need 2 phi_3, so without noise it is of order 2.
    """
    before: list[tuple[Array, float]] = []  # x0 of earlier levels with the step that followed, the last first
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        h = s.log_snr - t.log_snr
        left = math.exp(-eta * h) if eta else 1.0  # e^-k y is r left x / alpha_s: finite also from alpha = 0
        r = s.sigma / t.sigma
        x = r * left * x + (s.alpha - r * left * t.alpha) * x0
        if before and math.isfinite(h):
            x = x + s.alpha * _curvature(x0, before, h, (1 + eta) * h)
        if eta > 0 and s.sigma > 0:
            x = x + s.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * noise(number)
        before = [(x0, h), *before[:1]] if math.isfinite(h) else []
        x = yield from _reached(number, s, x, x0)


def _curvature(x0: Array, before: Sequence[tuple[Array, float]], h: float, k: float) -> Array:
    """phi_2 D1 - phi_3 D2 of dpmpp_3m_sde; with one earlier level phi_2 D1."""
    phi_2 = math.expm1(-k) / k + 1
    (x0_1, h_1), *older = before
    slope = (x0 - x0_1) * (h / h_1)
    if not older:
        return phi_2 * slope
    x0_2, h_2 = older[0]
    r_0, r_1 = h_1 / h, h_2 / h
    bend = (slope - (x0_1 - x0_2) / r_1) / (r_0 + r_1)
    return phi_2 * (slope + bend * r_0) - (phi_2 / k - 0.5) * bend


def deis(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """tAB-DEIS of order 2 (Zhang & Chen 2022): the noise, linear in log rho through two levels, integrated over rho."""
    before: tuple[NoiseLevel, Array] | None = None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        eps = (x - t.alpha * x0) / t.sigma
        if before is None:
            x = _towards(x, x0, t, s)
        else:
            u, eps_before = before
            now = _log_integral(s.ratio, t.ratio, u.ratio) - _log_integral(t.ratio, t.ratio, u.ratio)
            then = _log_integral(s.ratio, u.ratio, t.ratio) - _log_integral(t.ratio, u.ratio, t.ratio)
            x = s.alpha * (x / t.alpha + now * eps + then * eps_before)
        before = (t, eps) if t.alpha else None
        x = yield from _reached(number, s, x, x0)


def _log_integral(rho: float, here: float, other: float) -> float:
    """The integral over rho of the basis function (log rho - log other) / (log here - log other)."""
    if rho == 0:
        return 0.0
    return rho * (math.log(rho) - 1 - math.log(other)) / (math.log(here) - math.log(other))


def lms(denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None) -> Iterator[Step]:
    """Linear multistep (k-diffusion, sample_lms, order 4): the polynomial through up to four slopes, integrated."""
    known: list[tuple[float, Array]] = []  # rho and slope, the last first
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        if t.alpha == 0:
            x = _towards(x, x0, t, s)
        else:
            known = [(t.ratio, (x / t.alpha - x0) / t.ratio), *known[:3]]
            nodes = [rho for rho, _ in known]
            moved = sum(_lagrange_integral(nodes, i, t.ratio, s.ratio) * slope for i, (_, slope) in enumerate(known))
            x = s.alpha * (x / t.alpha + moved)
        x = yield from _reached(number, s, x, x0)


_GAUSS = ((-0.5773502691896257, 1.0), (0.5773502691896257, 1.0))  # exact for cubics


def _lagrange_integral(nodes: Sequence[float], index: int, first: float, last: float) -> float:
    """The integral from first to last of the Lagrange polynomial that is 1 at nodes[index]; of degree 3 at most."""
    half, middle = (last - first) / 2, (last + first) / 2
    total = 0.0
    for place, weight in _GAUSS:
        rho = middle + half * place
        others = [node for number, node in enumerate(nodes) if number != index]
        total += weight * math.prod((rho - node) / (nodes[index] - node) for node in others)
    return half * total


_ADAMS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """Improved PNDM (Liu et al. 2022; Zhang & Chen 2022, appendix H.2): Adams-Bashforth up to order 4 in rho.

    Its weights are those of equal steps, whatever the steps are. The step onto CLEAN is x0.
    """
    slopes: list[Array] = []
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        if t.alpha == 0 or s.sigma == 0:
            x = _towards(x, x0, t, s)
        else:
            slopes = [(x / t.alpha - x0) / t.ratio, *slopes[:3]]
            slope = sum(weight * each for weight, each in zip(_ADAMS[len(slopes) - 1], slopes, strict=True))
            x = s.alpha * (x / t.alpha + (s.ratio - t.ratio) * slope)
        x = yield from _reached(number, s, x, x0)


def plms(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, equations 11 to 13): Adams-Bashforth of eps in DDIM's step.

    The first step is made twice: to its end, and again with the mean of eps at both ends.
    """
    history: list[Array] = []
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        eps = (x - t.alpha * x0) / t.sigma
        history = [eps, *history[:3]]
        if number == 1 and s.sigma > 0:
            ahead = s.alpha * x0 + s.sigma * eps
            slope = (eps + (ahead - s.alpha * denoise(ahead, s)) / s.sigma) / 2
        else:
            slope = sum(weight * each for weight, each in zip(_ADAMS[len(history) - 1], history, strict=True))
        if t.alpha > 0:
            x0 = (x - t.sigma * slope) / t.alpha
        x = s.alpha * x0 + s.sigma * slope
        x = yield from _reached(number, s, x, x0)


def res_multistep(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None
) -> Iterator[Step]:
    """Refined exponential solver, two levels (Zhang et al. 2023): x0, linear in log-SNR, integrated exactly.

    y_s = e^-h y + h ((phi_1 + phi_2 / c) x0 - phi_2 / c x0_before), c = h_before / h,
    phi_1 = (1 - e^-h) / h, phi_2 = (1 - phi_1) / h.
    """
    before: tuple[Array, float] | None = None
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        h = s.log_snr - t.log_snr
        x = _towards(x, x0, t, s)
        if before is not None and math.isfinite(h):
            x0_before, h_before = before
            phi_2 = (1 + math.expm1(-h) / h) / h
            x = x + s.alpha * h * phi_2 * (h / h_before) * (x0 - x0_before)
        before = (x0, h) if math.isfinite(h) else None
        x = yield from _reached(number, s, x, x0)


def tcd(
    denoise: Denoiser, x: Array, levels: Levels, noise: Noise = silent, path: Path | None = None, *, eta: float = 0.3
) -> Iterator[Step]:
    """Trajectory consistency sampling (Zheng et al. 2024, algorithm 4), for distilled models; eta is their gamma.

    From x0 and its noise straight to the level at (1 - eta) times the next time, then noised up to the next level. That
    time is rounded down, as by its authors, where times are whole; grids between integer times keep it as it is.
    """
    for number, (t, s) in enumerate(pairwise(levels), 1):
        x0 = denoise(x, t)
        if s.sigma == 0 or path is None:
            x = _towards(x, x0, t, s)
        else:
            time = (1 - eta) * s.t
            between = (
                path.level(math.floor(time) if path.has_integer_times and s.t == int(s.t) else time) if eta > 0 else s
            )
            x = between.alpha * x0 + between.sigma * (x - t.alpha * x0) / t.sigma
            if eta > 0:
                r = s.alpha / between.alpha
                x = r * x + math.sqrt(max(s.sigma**2 - (r * between.sigma) ** 2, 0.0)) * noise(number)
        x = yield from _reached(number, s, x, x0)


@dataclass(frozen=True)
class Sampler:
    """A row of the table.

    label: A1111's name, for the metadata of pictures. schedulers: diffusers' classes that it replaces. options: the
    settings that a request may change, with their defaults. by_ratio: whether those classes work on x / alpha over
    sigma / alpha, and between integer times.
    """

    walk: Callable[..., Iterator[Step]]
    label: str
    schedulers: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    by_ratio: bool = False

    def with_options(self, **options: float | None) -> Any:
        """The walk with those options that are set. Raises ValueError for one that it does not take."""
        chosen = {name: value for name, value in options.items() if value is not None}
        if unknown := chosen.keys() - self.options.keys():
            raise ValueError(f"{self.label} takes no {min(unknown)}")
        return lambda *args: self.walk(*args, **chosen)


_ETA: Mapping[str, float] = MappingProxyType({"eta": 1.0})

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, "DDPM", ("DDPMScheduler",)),
    "ddim": Sampler(ddim, "DDIM", ("DDIMScheduler",), MappingProxyType({"eta": 0.0})),
    "euler": Sampler(euler, "Euler", ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"), by_ratio=True),
    "euler_ancestral": Sampler(euler_ancestral, "Euler a", ("EulerAncestralDiscreteScheduler",), _ETA, by_ratio=True),
    "heun": Sampler(heun, "Heun", ("HeunDiscreteScheduler",), MappingProxyType({"churn": 0.0}), by_ratio=True),
    "heun_exponential": Sampler(heun_exponential, "Heun exponential"),
    "dpm2": Sampler(dpm2, "DPM2", ("KDPM2DiscreteScheduler",), by_ratio=True),
    "dpm2_ancestral": Sampler(dpm2_ancestral, "DPM2 a", ("KDPM2AncestralDiscreteScheduler",), _ETA, by_ratio=True),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPM++ 2M", ("DPMSolverMultistepScheduler",)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "DPM++ 2M SDE"),
    "dpmpp_2s_ancestral": Sampler(dpmpp_2s_ancestral, "DPM++ 2S a", (), _ETA),
    "dpmpp_sde": Sampler(dpmpp_sde, "DPM++ SDE", ("DPMSolverSDEScheduler",), _ETA, by_ratio=True),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, "DPM++ 3M SDE", (), _ETA),
    "unipc": Sampler(unipc, "UniPC", ("UniPCMultistepScheduler",)),
    "deis": Sampler(deis, "DEIS", ("DEISMultistepScheduler",)),
    "lms": Sampler(lms, "LMS", ("LMSDiscreteScheduler",), by_ratio=True),
    "ipndm": Sampler(ipndm, "IPNDM"),
    "plms": Sampler(plms, "PLMS", ("PNDMScheduler",)),
    "res_multistep": Sampler(res_multistep, "Res Multistep"),
    "lcm": Sampler(lcm, "LCM", ("LCMScheduler",)),
    "tcd": Sampler(tcd, "TCD", ("TCDScheduler",), MappingProxyType({"eta": 0.3})),
}


def sampler_of(scheduler: str) -> str | None:
    """The sampler that replaces a scheduler class of diffusers, or None."""
    return next((name for name, row in SAMPLERS.items() if scheduler in row.schedulers), None)
