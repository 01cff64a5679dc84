"""Grids: at which times or noise levels a sampler stops on its way from the highest level to the lowest.

Two kinds, each a function on one screen. A path (`path.py`) turns their numbers into levels.

    of times    (T, steps, rounding) -> times counted from 0 to T - 1, highest first; `rounding` rounds where a path has
                integer times only
    of ratios   (steps, lowest, highest) -> noise-to-signal ratios sigma / alpha, highest first
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rounding = Callable[[float], float]
TimeGrid = Callable[[int, int, Rounding], list[float]]
RatioGrid = Callable[[int, float, float], list[float]]


def trailing(T: int, steps: int, rounding: Rounding) -> list[float]:
    """From the last time, in equal steps (Lin et al. 2023, table 2)."""
    return [rounding(T - i * T / steps) - 1 for i in range(steps)]


def leading(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Multiples of T // steps with an offset of 1 (Lin et al. 2023, table 2); never starts at the last time."""
    stride = T // steps
    offset = min(1, T - 1 - (steps - 1) * stride)
    return [float(i * stride + offset) for i in reversed(range(steps))]


def leading_zero(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Multiples of T // steps without an offset: diffusers' `steps_offset=0`, as DiT has it."""
    return [float(i * (T // steps)) for i in reversed(range(steps))]


def linspace(T: int, steps: int, rounding: Rounding) -> list[float]:
    """From the last time to the first, both included (Lin et al. 2023, table 2)."""
    return [rounding(value) for value in _even(T - 1, 0, steps)]


def leading_open(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Leading with steps + 1 times, without the last one: diffusers' multistep solvers (DPM++, UniPC, DEIS)."""
    if steps == T:
        return leading(T, steps, rounding)
    stride = T // (steps + 1)
    offset = min(1, T - 1 - steps * stride)
    return [float(i * stride + offset) for i in reversed(range(1, steps + 1))]


def linspace_open(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Linspace with steps + 1 times, without the last one: diffusers' multistep solvers."""
    return [rounding(value) for value in _even(T - 1, 0, min(steps + 1, T))[:steps]]


def linspace_exact(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Linspace between integer times too: diffusers' Euler, Heun, LMS and DPM2."""
    return _even(T - 1, 0, steps)


def distilled(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Every (50 / steps)-th of the fifty times T i / 50 - 1 that latent consistency models are distilled on."""
    origins = max(50, steps)
    return [float((origins - math.floor(i * origins / steps)) * T // origins - 1) for i in range(steps)]


def sgm_uniform(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Equal steps from the last time towards the first, which is left out (Stability AI's generative-models)."""
    return _even(T - 1, 0, steps + 1)[:-1]


def beta(T: int, steps: int, rounding: Rounding) -> list[float]:
    """Quantiles of the Beta(0.6, 0.6) distribution: dense at both ends (Lee et al. 2024)."""
    from scipy.special import betaincinv  # takes a while to import

    return [float(betaincinv(0.6, 0.6, 1 - i / steps)) * (T - 1) for i in range(steps)]


def karras(steps: int, lowest: float, highest: float, rho: float = 7) -> list[float]:
    """Even in ratio^(1/rho) (Karras et al. 2022, eq. 5)."""
    return [root**rho for root in _even(highest ** (1 / rho), lowest ** (1 / rho), steps)]


def exponential(steps: int, lowest: float, highest: float) -> list[float]:
    """Even in the log of the ratio, that is in log-SNR."""
    return [math.exp(value) for value in _even(math.log(highest), math.log(lowest), steps)]


AYS_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def align_your_steps(steps: int, lowest: float, highest: float, published: Sequence[float] = AYS_SD) -> list[float]:
    """The published levels of Sabour et al. 2024 for ten steps of Stable Diffusion 1, log-linear between them.

    The lowest, where the picture is clean, is left out. For another range the levels are stretched in the log.
    """
    logs = [math.log(ratio) for ratio in published]
    places = _even(0, len(logs) - 1, steps + 1)[:-1]
    times = [_between(logs, place) for place in places]
    stretch = (math.log(highest) - math.log(lowest)) / (logs[0] - logs[-1])
    return [math.exp(math.log(highest) + (value - logs[0]) * stretch) for value in times]


def align_your_steps_xl(steps: int, lowest: float, highest: float) -> list[float]:
    """As `align_your_steps`, with the levels published for Stable Diffusion XL."""
    return align_your_steps(steps, lowest, highest, AYS_SDXL)


def _even(first: float, last: float, count: int) -> list[float]:
    """`count` evenly spaced numbers, both ends included; a single number is `first`."""
    if count == 1:
        return [float(first)]
    step = (last - first) / (count - 1)
    return [first + i * step for i in range(count - 1)] + [float(last)]


def _between(values: Sequence[float], place: float) -> float:
    """Linear interpolation at a fractional index."""
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


TIME_GRIDS: dict[str, TimeGrid] = {
    "trailing": trailing,
    "leading": leading,
    "leading_zero": leading_zero,
    "linspace": linspace,
    "leading_open": leading_open,
    "linspace_open": linspace_open,
    "linspace_exact": linspace_exact,
    "distilled": distilled,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
}
RATIO_GRIDS: dict[str, RatioGrid] = {
    "karras": karras,
    "exponential": exponential,
    "align_your_steps": align_your_steps,
    "align_your_steps_xl": align_your_steps_xl,
}
GRIDS: tuple[str, ...] = (*TIME_GRIDS, *RATIO_GRIDS)
LABELS = {  # what A1111's metadata calls them; others are "Automatic"
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
    "align_your_steps": "Align Your Steps",
    "align_your_steps_xl": "Align Your Steps",
}
