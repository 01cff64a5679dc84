"""Mean flows: a network of the average velocity between two times of a straight path (Geng et al. 2025).

    u(x_t, r, t) = 1 / (t - r) int_r^t v(x_s, s) ds          x_r = x_t - (t - r) u(x_t, r, t)          r <= t, in [0, 1]

    loss = |u(x_t, r, t) - goal|^2 / (its own value + c)^p          goal = v - (t - r) du/dt, without gradient

with v = noise - x0 and u(x_t, t, t) = v, so one step from t = 1 to r = 0 draws a picture (their equations 3, 6 and 12,
and their adaptive weight). The derivative along the path, where x_t changes by v, is a difference of two evaluations,

    du/dt = (u(x_t + h v, r, t + h) - u(x_t - h v, r, t - h)) / 2h

since attention kernels have no forward derivative; at t = 1 it is one-sided. A guided student learns
free + w (v - free) in place of v, where `free` is the velocity that the original model predicts without a prompt
(equation 19).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.jump import scale_of
from latentdiff.diffusion.parametrization import Network
from latentdiff.diffusion.path import Path, Straight

SHARE_OF_INTERVALS = 0.25  # the share of samples with r < t; the others keep the instantaneous velocity
LOG_MEAN, LOG_STD = -0.4, 1.0  # times are sigmoids of normal draws
STEP = 0.01  # the largest h
C = 1e-3


class MeanFlowLoss:
    """The loss of a student that reads the condition `until`, the time 1000 r.

    guidance: the scale of guidance inside the student; 1 is none. power: p. The weight suits data of many values, in
    which a sample's loss is near the mean loss; with few values u would tend to the commonest x0, not the mean. Raises
    ValueError for a path that is not straight.
    """

    def __init__(self, path: Path, *, guidance: float, power: float = 1.0):
        if not isinstance(path, Straight):
            raise ValueError("a mean flow requires a straight path")
        self.path, self._guidance, self._power = path, guidance, power

    def rows(self, t: float, rng: np.random.Generator) -> Tensor:
        """The shares t and r of a training time and of another one, (2,): the later one first; often they are equal."""
        one = t / self.path.T
        other = 1 / (1 + math.exp(-(LOG_MEAN + LOG_STD * rng.standard_normal())))
        if rng.random() >= SHARE_OF_INTERVALS:
            other = one
        return torch.tensor([max(one, other), min(one, other)], dtype=torch.float32)

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
        """x0 and noise (B, ...), rows (B, 2), conditions with and without prompt -> losses (B,)."""
        t, r = (share.reshape(-1, *[1] * (x0.ndim - 1)) for share in rows.to(x0.device).unbind(1))
        x, v = (1 - t) * x0 + t * noise, noise - x0

        def average(x: Tensor, t: Tensor) -> Tensor:
            T = self.path.T
            return student(x, T * t.flatten(), cond.joined({"until": T * r.flatten()})).float()

        with torch.no_grad():
            scale = scale_of(self._guidance, guidance, x)
            if scale is not None:
                free = teacher(x, self.path.T * t.flatten(), uncond).float()
                v = free + scale * (v - free)
            h = ((t - r) / 2).clamp(1e-4, STEP)
            later, earlier = (t + h).clamp(max=1.0), (t - h).clamp(min=0.0)
            change = average(x + (later - t) * v, later) - average(x + (earlier - t) * v, earlier)
            goal = v - (t - r) * change / (later - earlier)
        loss = (average(x, t) - goal).flatten(1).square().sum(1)
        return loss / (loss.detach() + C) ** self._power
