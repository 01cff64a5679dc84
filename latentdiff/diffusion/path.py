"""Paths: which noise levels there are between data and noise, and which of them a sampler or a training visits.

    x_t = alpha_t x0 + sigma_t noise

    VariancePreserving   alpha_t^2 = alphas_cumprod[t], alpha^2 + sigma^2 = 1, integer times 0 .. T - 1   Ho et al. 2020
    Straight             alpha = 1 - t / T, sigma = t / T, any time in (0, T]                           Liu et al. 2022

Coefficients are float64 here and Python floats outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentdiff.diffusion.grids import GRIDS, RATIO_GRIDS, TIME_GRIDS
from latentdiff.diffusion.level import CLEAN, NoiseLevel

Floats = NDArray[np.float64]


class Path(Protocol):
    """Noise levels by time; a time is also an input of the network."""

    @property
    def T(self) -> int:  # noqa: N802 - the field's symbol
        """The number of steps of the discrete process, and the scale of times."""
        ...

    @property
    def has_integer_times(self) -> bool:
        """Whether training draws integer times only."""
        ...

    def level(self, t: float) -> NoiseLevel:
        """The level at a time. Raises ValueError for a time outside the path."""
        ...

    def numbered(self, number: float) -> NoiseLevel:
        """The level counted from 0, the least noise, to T - 1, the most, before any shift."""
        ...

    def level_of(self, ratio: float) -> NoiseLevel:
        """The level of a finite noise-to-signal ratio sigma / alpha, with the time that belongs to it."""
        ...

    def level_of_sigma(self, sigma: float) -> NoiseLevel:
        """The level of what diffusers calls sigma: sigma / alpha where variance is preserved, else sigma itself."""
        ...

    def scales(self, t: Floats) -> tuple[Floats, Floats]:
        """(alpha, sigma) of many times, for training."""
        ...

    def levels(self, steps: int, grid: str = "trailing", tokens: int = 0) -> tuple[NoiseLevel, ...]:
        """A descending grid of `steps` levels, then CLEAN; tokens: the number in the latents, for some shifts."""
        ...


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """The levels of a forward process of T steps: `alphas_cumprod`, (T,) float64, strictly decreasing in [0, 1)."""

    alphas_cumprod: Floats

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if not (a.ndim == 1 and len(a) >= 2 and (np.diff(a) < 0).all() and a[0] < 1 and a[-1] >= 0):
            raise ValueError("alphas_cumprod must decrease strictly within [0, 1)")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VariancePreserving):
            return False
        return np.array_equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(self.alphas_cumprod.tobytes())

    @classmethod
    def from_betas(cls, betas: NDArray[np.floating]) -> VariancePreserving:
        """From the variances of the Markov steps, betas (T,) in (0, 1)."""
        return cls(np.asarray(np.cumprod(1 - betas), np.float64))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VariancePreserving:
        """Ho et al. 2020: betas linear in t."""
        return cls.from_betas(np.linspace(beta_start, beta_end, T))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> VariancePreserving:
        """Rombach et al. 2022 (Stable Diffusion), the "quadratic" schedule: square roots of betas linear in t."""
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> VariancePreserving:
        """Nichol & Dhariwal 2021, eq. 17: beta_t = 1 - f(t + 1) / f(t), f(t) = cos^2((t/T + s) / (1 + s) pi/2)."""
        f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))

    @classmethod
    def sigmoid(cls, T: int = 1000, start: float = -3, end: float = 3, tau: float = 1) -> VariancePreserving:
        """Jabri et al. 2022: alphas_cumprod falls like a sigmoid between `start` and `end`, steepness 1 / tau.

        Normalised to 1 at time -1 and stopped short of 0 by one beta of at most 0.999.
        """
        falling = 1 / (1 + np.exp(np.linspace(start, end, T + 1) / tau))
        f = (falling - falling[-1]) / (falling[0] - falling[-1])
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], 0.999))

    @property
    def T(self) -> int:  # noqa: N802 - the field's symbol
        """The number of times."""
        return len(self.alphas_cumprod)

    @property
    def has_integer_times(self) -> bool:
        """True: the process has T steps."""
        return True

    @property
    def betas(self) -> Floats:
        """Variances of the Markov steps, (T,): beta_t = 1 - alphas_cumprod[t] / alphas_cumprod[t - 1]."""
        return 1 - self.alphas_cumprod / np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    def zero_terminal_snr(self) -> VariancePreserving:
        """Lin et al. 2023, algorithm 1: shift and scale sqrt(alphas_cumprod) so that the last is exactly 0."""
        root = np.sqrt(self.alphas_cumprod)
        rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        rescaled[0] = self.alphas_cumprod[0]
        return VariancePreserving(rescaled)

    def level(self, t: float) -> NoiseLevel:
        """The level at time t in [0, T - 1]; between integer times the angle atan(sigma / alpha) is linear in t."""
        if not 0 <= t <= self.T - 1:
            raise ValueError(f"t must be from 0 to {self.T - 1} (got {t})")
        if t == int(t):
            a = float(self.alphas_cumprod[int(t)])
            return NoiseLevel(float(t), math.sqrt(a), math.sqrt(1 - a))
        angle = float(np.interp(t, np.arange(self.T), self._angles))
        return NoiseLevel(float(t), math.cos(angle), math.sin(angle))

    numbered = level

    def level_of(self, ratio: float) -> NoiseLevel:
        """See Path: its time by the angle, as in `level`; a ratio beyond the path has the nearest time."""
        t = float(np.interp(math.atan(ratio), self._angles, np.arange(self.T)))
        return NoiseLevel(t, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))

    def level_of_sigma(self, sigma: float) -> NoiseLevel:
        """See Path."""
        return self.level_of(sigma)

    def scales(self, t: Floats) -> tuple[Floats, Floats]:
        """(alpha, sigma) of times in [0, T - 1]."""
        if (t == t.astype(np.int64)).all():
            a = self.alphas_cumprod[t.astype(np.int64)]
            return np.sqrt(a), np.sqrt(1 - a)
        angles = np.interp(t, np.arange(self.T), self._angles)
        return np.cos(angles), np.sin(angles)

    def levels(self, steps: int, grid: str = "trailing", tokens: int = 0) -> tuple[NoiseLevel, ...]:
        """See Path. At zero terminal SNR, grids of ratios begin with the last time, whose ratio is infinite."""
        return grid_levels(self, steps, grid, round)

    @property
    def _angles(self) -> Floats:
        return np.arctan2(np.sqrt(1 - self.alphas_cumprod), np.sqrt(self.alphas_cumprod))


class Growth(Protocol):
    """A shift that depends on the picture: larger pictures require more noise to hide what is in them."""

    def log_shift(self, tokens: int, steps: int) -> float:
        """The logarithm of the shift for latents of that many tokens, drawn in that many steps."""
        ...


@dataclass(frozen=True)
class ByTokens:
    """Linear in the number of tokens, through `low` at `few` tokens and `high` at `many`."""

    few: int
    low: float
    many: int
    high: float

    def log_shift(self, tokens: int, steps: int) -> float:
        """See Growth."""
        return self.low + (self.high - self.low) * (tokens - self.few) / (self.many - self.few)


@dataclass(frozen=True)
class ByTokensAndSteps:
    """Linear in the number of steps too, between two lines (steps, slope, intercept) over the number of tokens.

    many: above that many tokens the second line is used whatever the steps.
    """

    first: tuple[int, float, float]
    second: tuple[int, float, float]
    many: int

    def log_shift(self, tokens: int, steps: int) -> float:
        """See Growth."""
        (few, low), (most, high) = ((each[0], each[1] * tokens + each[2]) for each in (self.first, self.second))
        return high if tokens > self.many else high + (high - low) * (steps - most) / (most - few)


@dataclass(frozen=True)
class Straight:
    """Rectified flow: x_t = (1 - s) x0 + s noise, s = t / T.

    shift: moves grids and training times towards noise, s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024,
    eq. 23). growth: replaces the shift where the number of tokens is known. terminal: the share s of the last level
    before CLEAN, to which grids are stretched.
    """

    shift: float = 1.0
    growth: Growth | None = None
    T: int = 1000
    terminal: float | None = None

    @property
    def has_integer_times(self) -> bool:
        """False: times are continuous."""
        return False

    def level(self, t: float) -> NoiseLevel:
        """The level at time t in [0, T]."""
        if not 0 <= t <= self.T:
            raise ValueError(f"t must be from 0 to {self.T} (got {t})")
        sigma = t / self.T
        return NoiseLevel(float(t), 1 - sigma, sigma)

    def numbered(self, number: float) -> NoiseLevel:
        """See Path: number n is time n + 1."""
        return self.level(number + 1)

    def level_of(self, ratio: float) -> NoiseLevel:
        """See Path: s = ratio / (1 + ratio)."""
        return NoiseLevel(self.T * ratio / (1 + ratio), 1 / (1 + ratio), ratio / (1 + ratio))

    def level_of_sigma(self, sigma: float) -> NoiseLevel:
        """See Path."""
        return self.level(sigma * self.T)

    def scales(self, t: Floats) -> tuple[Floats, Floats]:
        """(alpha, sigma) of times in [0, T]."""
        return 1 - t / self.T, t / self.T

    def levels(self, steps: int, grid: str = "trailing", tokens: int = 0) -> tuple[NoiseLevel, ...]:
        """See Path. Grids of times are shifted; grids of ratios are not.

        `linspace` ends at the lowest training level, which is already shifted and is shifted once more, as in
        Stability AI's sd3-ref and in diffusers.
        """
        if grid == "linspace" and 1 < steps <= self.T:
            lowest = 1 / self.T if self.growth else float(self.shifted(np.array(1 / self.T)))
            shares = self.shifted(np.linspace(1, lowest, steps), tokens, steps)
            return self._stretched([self.level(self.T * float(share)) for share in shares])
        levels = grid_levels(self, steps, grid, lambda value: value, shift=self.shift_of(tokens, steps))
        return self._stretched(levels[:-1])

    def _stretched(self, levels: Sequence[NoiseLevel]) -> tuple[NoiseLevel, ...]:
        """Levels whose distance to pure noise, 1 - s, is scaled so that the last has the share `terminal`."""
        last = 1 - levels[-1].sigma
        if self.terminal is None or last == 0:  # a single step begins at pure noise and ends at CLEAN
            return *levels, CLEAN
        scale = last / (1 - self.terminal)
        return (*(self.level(self.T * (1 - (1 - level.sigma) / scale)) for level in levels), CLEAN)

    def shift_of(self, tokens: int = 0, steps: int = 0) -> float:
        """The shift for latents of that many tokens, 0 if unknown, drawn in that many steps."""
        return math.exp(self.growth.log_shift(tokens, steps)) if self.growth and tokens else self.shift

    def shifted(self, s: Floats, tokens: int = 0, steps: int = 0) -> Floats:
        """Shares s in [0, 1] moved by the shift."""
        shift = self.shift_of(tokens, steps)
        return np.where(s == 1, 1.0, shift * s / (1 + (shift - 1) * s))  # exact at 1, in spite of rounding


def grid_levels(
    path: VariancePreserving | Straight, steps: int, grid: str, rounding: Callable[[float], float], shift: float = 1.0
) -> tuple[NoiseLevel, ...]:
    """The levels of a grid by name, then CLEAN. Raises ValueError for an unknown one, or too many steps."""
    if not 1 <= steps <= path.T:
        raise ValueError(f"steps must be from 1 to {path.T} (got {steps})")
    if grid in TIME_GRIDS:
        levels = [path.numbered(number) for number in TIME_GRIDS[grid](path.T, steps, rounding)]
        if shift != 1:
            levels = [path.level_of(shift * level.ratio) if level.alpha else level for level in levels]
    elif grid in RATIO_GRIDS:
        levels = _by_ratio(path, steps, grid)
    else:
        raise ValueError(f"unknown spacing {grid!r}; one of {', '.join(GRIDS)}")
    return (*levels, CLEAN)


def _by_ratio(path: VariancePreserving | Straight, steps: int, grid: str) -> list[NoiseLevel]:
    """From the highest level to the lowest; where the highest is pure noise, it comes first by itself."""
    top, bottom = path.numbered(path.T - 1), path.numbered(0)
    first = [top] if top.alpha == 0 else []
    if len(first) == steps:
        return first
    highest = path.numbered(path.T - 2) if first else top
    return [*first, *map(path.level_of, RATIO_GRIDS[grid](steps - len(first), bottom.ratio, highest.ratio))]


def schedule_named(kind: str, T: int, betas: Sequence[float] = ()) -> VariancePreserving:
    """A variance-preserving path by the name of its schedule; `betas` are (start, end) of the linear kinds."""
    kinds = {
        "linear": VariancePreserving.linear,
        "scaled_linear": VariancePreserving.scaled_linear,
        "cosine": VariancePreserving.cosine,
        "sigmoid": VariancePreserving.sigmoid,
    }
    if kind not in kinds:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(kinds)}")
    return kinds[kind](T, *betas)
