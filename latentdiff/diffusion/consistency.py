"""Consistency distillation: a student that jumps from any level to the end of its teacher's guided path.

    loss = E 1 / (r_t - r_s) d(f(x_t, t), f(x_s, s) without gradient)

    x_s: one DDIM step of the guided teacher from x_t          r = sigma / alpha

with d the pseudo-Huber distance (Song et al. 2023, Consistency Models; Luo et al. 2023, Latent Consistency Models,
algorithm 1). The student contains the teacher's guidance and is sampled without any. f: see diffusion/jump.py.

The weight is that of Song and Dhariwal 2024 (section 3.1). With equal weights, as Luo et al. have them, large errors
at high noise spoil what a small student knows at low noise, from which it learns the rest: its loss rises instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.jump import clean_level, columns, denoised, pair_loss, scale_of, table
from latentdiff.diffusion.parametrization import Network
from latentdiff.diffusion.path import Path


class ConsistencyLoss:
    """The loss of a student between neighbours of a grid of levels, 0 the noisiest.

    guidance: the scale of the teacher's classifier-free guidance; 1 is none. huber: c per value.
    """

    def __init__(self, path: Path, prediction: str, *, steps: int, guidance: float, huber: float):
        self.path, self.steps, self._guidance, self._huber = path, steps, guidance, huber
        grid = path.levels(steps, "distilled" if path.has_integer_times else "trailing")[:-1]
        self._table = table([*grid, clean_level(path)], prediction)
        self._times = -np.array([level.t for level in grid])

    def number(self, t: float) -> int:
        """The index in the grid of the last time that is not below a training time."""
        return max(int(np.searchsorted(self._times, -t, "right")) - 1, 0)

    def rows(self, t: float, rng: Any = None) -> Tensor:
        """The rows of the level that a training time stands for and of the next one, (2, 8). rng is not used."""
        number = self.number(t)
        return self._table[number : number + 2]

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
            guided = denoised(teacher, x, at, cond)
            scale = scale_of(self._guidance, guidance, x)
            if scale is not None:
                free = denoised(teacher, x, at, uncond)
                guided = free + scale * (guided - free)
        return pair_loss(student, x, guided, at, after, cond, self._huber)
