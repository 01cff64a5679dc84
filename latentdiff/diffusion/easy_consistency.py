"""Easy consistency tuning: a model learns to jump from its own data, without a solver (Geng et al. 2024).

    loss = E 1 / (r_t - r_s) d(f(x_t, t), f(x_s, s) without gradient)       x_t = alpha_t x0 + sigma_t noise
    r_s = r_t (1 - n(r_t) / q)        n(r) = 1 + k sigmoid(-b r)            x_s = alpha_s x0 + sigma_s noise

with the noise-to-signal ratio r = sigma / alpha (their t), one x0 and noise for both, and the pseudo-Huber distance d
(their sections 3 and 4). At q = 1 this is the diffusion loss: x_s is the data. f: see diffusion/jump.py.

A guided student: x_s is a step towards free + w (x0 - free) instead of x0, where `free` is what the original model
predicts without a prompt. On average over the data this is the guided direction of the path (as in Geng et al. 2025,
Mean Flows, equation 19).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.jump import LARGEST_RATIO, clean_level, columns, denoised, pair_loss, scale_of, table
from latentdiff.diffusion.parametrization import Network
from latentdiff.diffusion.path import Path

K, B = 8.0, 1.0
LOG_MEAN, LOG_STD = -1.1, 2.0  # of the logarithm of the ratios in training


class EasyConsistencyLoss:
    """The loss of a student between two levels of one noisy picture.

    guidance: the scale of guidance inside the student; 1 is none. huber: c per value. shrink: q.
    """

    def __init__(self, path: Path, prediction: str, *, shrink: float, guidance: float, huber: float):
        self.path, self._prediction, self._shrink = path, prediction, shrink
        self._guidance, self._huber = guidance, huber

    def rows(self, t: float, rng: Any = None) -> Tensor:
        """The rows of the level of a training time and of the next, less noisy one, (2, 8). rng is not used."""
        level = self.path.level(t)
        ratio = min(level.ratio, LARGEST_RATIO)
        share = (1 + K / (1 + math.exp(B * ratio))) / self._shrink
        after = self.path.level_of(ratio * max(1 - share, 0.0))
        if after.t <= self.path.numbered(0).t:
            after = clean_level(self.path)
        return table([level, after], self._prediction)

    def __call__(
        self,
        student: Network,
        teacher: Network,
        x0: Tensor,
        noise: Tensor,
        rows: Tensor,
        cond: Any,
        uncond: Any,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """x0 and noise (B, ...), rows (B, 2, 8), conditions with and without prompt -> losses (B,).

        guidance: a scale for each sample (B,), for a student that reads it.
        """
        at, after = columns(rows[:, 0], x0), columns(rows[:, 1], x0)
        x = at.alpha * x0 + at.sigma * noise
        with torch.no_grad():
            guided = x0
            scale = scale_of(self._guidance, guidance, x)
            if scale is not None:
                free = denoised(teacher, x, at, uncond)
                guided = free + scale * (x0 - free)
        return pair_loss(student, x, guided, at, after, cond, self._huber)
