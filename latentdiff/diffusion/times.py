"""Times: at which noise levels a denoiser is trained.

    uniform        every time equally often
    logit_normal   s = sigmoid(mean + std z), z ~ N(0, 1): more often in the middle (Esser et al. 2024, eq. 19)
    log_normal     sigma / alpha = exp(mean + std z) (Karras et al. 2022, table 1); draws beyond the end of the path
                   become its last time

A time is a share s in [0, 1] of the path; on a path with integer times it is one of them. A validation draws from bins
of equal width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from latentdiff.diffusion.path import Path, Straight

DISTRIBUTIONS = ("uniform", "logit_normal", "log_normal")


@dataclass(frozen=True)
class Times:
    """The distribution of training times on a path; bins: their number in a validation, otherwise 0."""

    path: Path
    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    bins: int = 0

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"times must be one of {', '.join(DISTRIBUTIONS)} (got {self.distribution!r})")
        if self.bins and self.distribution == "log_normal":
            raise ValueError("bins require a distribution of shares, not of noise-to-signal ratios")

    def draw(self, rng: np.random.Generator, number: int = 0) -> np.int64 | np.float64:
        """One time; in a validation from bin `number` % bins."""
        T = self.path.T
        if self.distribution == "logit_normal":
            share = 1 / (1 + math.exp(-(self.mean + self.std * rng.standard_normal())))
        elif self.distribution == "log_normal":
            return self._of_ratio(math.exp(self.mean + self.std * rng.standard_normal()))
        elif self.path.has_integer_times:
            whole = rng.integers(T)
            share = whole / T
        else:
            share = 1 - rng.random()  # in (0, 1]: at 0 there is nothing to learn
        if self.bins:
            share = (number % self.bins + rng.random()) / self.bins
        elif self.path.has_integer_times and self.distribution == "uniform":
            return np.int64(whole)
        if self.path.has_integer_times:
            return np.int64(min(share * T, T - 1))
        shifted = float(self.path.shifted(np.array(share))) if isinstance(self.path, Straight) else share
        return np.float64(max(shifted, 1e-6) * T)

    def _of_ratio(self, ratio: float) -> np.int64 | np.float64:
        t = self.path.level_of(ratio).t
        return np.int64(round(t)) if self.path.has_integer_times else np.float64(max(t, 1e-6 * self.path.T))
