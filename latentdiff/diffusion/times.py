"""Times: at which noise levels a denoiser is trained.

    uniform        every time alike
    logit_normal   s = sigmoid(mean + std z), z ~ N(0, 1): more often in the middle (Esser et al. 2024, eq. 19)

A share s in [0, 1] of the path is a time; of a path with whole times these are drawn. A validation draws from bins of
equal width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from latentdiff.diffusion.path import Path, Straight

DISTRIBUTIONS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class Times:
    """How training times of a path are drawn; bins: of a validation, else 0."""

    path: Path
    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    bins: int = 0

    def draw(self, rng: np.random.Generator, number: int = 0) -> np.int64 | np.float64:
        """One time; of a validation from bin `number` % bins."""
        T = self.path.T
        if self.distribution == "logit_normal":
            share = 1 / (1 + math.exp(-(self.mean + self.std * rng.standard_normal())))
        elif self.path.whole:
            drawn = rng.integers(T)
            share = drawn / T
        else:
            share = 1 - rng.random()  # in (0, 1]: at 0 nothing is to be learnt
        if self.bins:
            share = (number % self.bins + rng.random()) / self.bins
        elif self.path.whole and self.distribution == "uniform":
            return np.int64(drawn)
        if self.path.whole:
            return np.int64(min(share * T, T - 1))
        shifted = float(self.path.shifted(np.array(share))) if isinstance(self.path, Straight) else share
        return np.float64(max(shifted, 1e-6) * T)
