"""Noise levels: how much signal and noise there is at each time of the forward process.

    x_t = alpha_t x0 + sigma_t noise,    alpha_t^2 = alphas_cumprod[t],    alpha_t^2 + sigma_t^2 = 1

(Ho et al. 2020, eq. 4.) Times run from 0 (little noise) to T - 1. Coefficients are float64 here and Python
floats outside, so that arrays of any library and precision keep their type under them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Spacing = Literal["trailing", "leading", "linspace", "karras", "uniform"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


@dataclass(frozen=True)
class NoiseLevel:
    """Signal and noise scales at time t."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), in [-inf, inf]: DPM-Solver's lambda, half of the log of the SNR."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)

    @property
    def snr(self) -> float:
        """(alpha / sigma)^2, in [0, inf]."""
        return math.inf if self.sigma == 0 else (self.alpha / self.sigma) ** 2


CLEAN = NoiseLevel(t=-1, alpha=1.0, sigma=0.0)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The levels of a forward process of T steps: `alphas_cumprod`, (T,) float64, strictly decreasing in [0, 1)."""

    alphas_cumprod: NDArray[np.float64]

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if not (a.ndim == 1 and len(a) >= 2 and (np.diff(a) < 0).all() and a[0] < 1 and a[-1] >= 0):
            raise ValueError("alphas_cumprod must decrease strictly within [0, 1)")

    @classmethod
    def from_betas(cls, betas: NDArray[np.floating]) -> NoiseSchedule:
        """From the variances of the Markov steps, betas (T,) in (0, 1)."""
        return cls(np.asarray(np.cumprod(1 - betas), np.float64))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Ho et al. 2020: betas linear in t."""
        return cls.from_betas(np.linspace(beta_start, beta_end, T))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """Rombach et al. 2022 (Stable Diffusion), the "quadratic" schedule: square roots of betas linear in t."""
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """Nichol & Dhariwal 2021, eq. 17: beta_t = 1 - f(t + 1) / f(t), f(t) = cos^2((t/T + s) / (1 + s) pi/2)."""
        f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))

    @classmethod
    def sigmoid(cls, T: int = 1000, start: float = -3, end: float = 3, tau: float = 1) -> NoiseSchedule:
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
    def betas(self) -> NDArray[np.float64]:
        """Variances of the Markov steps, (T,): beta_t = 1 - alphas_cumprod[t] / alphas_cumprod[t - 1]."""
        return 1 - self.alphas_cumprod / np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Lin et al. 2023, algorithm 1: shift and scale sqrt(alphas_cumprod) so that the last is exactly 0."""
        root = np.sqrt(self.alphas_cumprod)
        rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        rescaled[0] = self.alphas_cumprod[0]
        return NoiseSchedule(rescaled)

    def level(self, t: float) -> NoiseLevel:
        """The level at time t in [0, T - 1]; between whole times the angle atan(sigma / alpha) is linear in t."""
        if not 0 <= t <= self.T - 1:
            raise ValueError(f"t must be from 0 to {self.T - 1} (got {t})")
        if t == int(t):
            a = float(self.alphas_cumprod[int(t)])
            return NoiseLevel(float(t), math.sqrt(a), math.sqrt(1 - a))
        angle = float(np.interp(t, np.arange(self.T), self._angles))
        return NoiseLevel(float(t), math.cos(angle), math.sin(angle))

    def levels(self, steps: int, spacing: str = "trailing") -> tuple[NoiseLevel, ...]:
        """A descending grid of `steps` levels, then CLEAN.

        trailing, leading, linspace: whole times, as in Lin et al. 2023, table 2 (leading with offset 1).
        karras: sigma / alpha to the power 1/7 evenly spaced (Karras et al. 2022, eq. 5); uniform: log-SNR evenly
        spaced; both from the last time to time 0. At zero terminal SNR the last time comes first by itself.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be from 1 to {self.T} (got {steps})")
        if spacing in ("karras", "uniform"):
            return (*self._spaced(steps, spacing), CLEAN)
        return (*(self.level(t) for t in self._times(steps, spacing)), CLEAN)

    @property
    def _angles(self) -> NDArray[np.float64]:
        return np.arctan2(np.sqrt(1 - self.alphas_cumprod), np.sqrt(self.alphas_cumprod))

    def _times(self, steps: int, spacing: str) -> list[int]:
        if spacing == "trailing":
            return [round(self.T - i * self.T / steps) - 1 for i in range(steps)]
        if spacing == "leading":
            stride = self.T // steps
            offset = min(1, self.T - 1 - (steps - 1) * stride)
            return [i * stride + offset for i in reversed(range(steps))]
        if spacing == "linspace":
            return [int(t) for t in np.round(np.linspace(self.T - 1, 0, steps))]
        raise ValueError(f"unknown spacing {spacing!r}; one of {', '.join(SPACINGS)}")

    def _spaced(self, steps: int, spacing: str) -> list[NoiseLevel]:
        top = self.level(self.T - 1)
        if top.alpha == 0:
            rest = self._between(self.level(self.T - 2), steps - 1, spacing) if steps > 1 else []
            return [top, *rest]
        return self._between(top, steps, spacing)

    def _between(self, top: NoiseLevel, steps: int, spacing: str) -> list[NoiseLevel]:
        bottom = self.level(0)
        if spacing == "karras":
            ratios = karras(steps, bottom.sigma / bottom.alpha, top.sigma / top.alpha)
        else:
            ratios = np.exp(-np.linspace(top.log_snr, bottom.log_snr, steps))
        times = np.interp(np.arctan(ratios), self._angles, np.arange(self.T))
        return [
            NoiseLevel(float(t), 1 / math.hypot(1, r), r / math.hypot(1, r))
            for t, r in zip(times, ratios.tolist(), strict=True)
        ]


def karras(steps: int, lowest: float, highest: float, rho: float = 7) -> NDArray[np.float64]:
    """Karras et al. 2022, eq. 5: `steps` noise-to-signal ratios from `highest` to `lowest`."""
    roots = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), steps)
    return np.asarray(roots**rho, dtype=np.float64)


def schedule_named(kind: str, T: int, betas: Sequence[float] = ()) -> NoiseSchedule:
    """A schedule by name; `betas` are (start, end) of the linear kinds where they differ from the defaults."""
    kinds = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
        "sigmoid": NoiseSchedule.sigmoid,
    }
    if kind not in kinds:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(kinds)}")
    return kinds[kind](T, *betas)
