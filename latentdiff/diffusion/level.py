"""A noise level: how much signal and how much noise x_t holds.

x_t = alpha x0 + sigma noise
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class NoiseLevel:
    """Signal and noise scales at time t, Python floats: arrays of any library and precision keep their type."""

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

    @property
    def ratio(self) -> float:
        """sigma / alpha, in [0, inf]: the noise level of Karras et al. 2022, who write x_t / alpha."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha


CLEAN = NoiseLevel(t=-1, alpha=1.0, sigma=0.0)
