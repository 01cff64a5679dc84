"""Consistency distillation: a student that jumps from any level to x0, as its teacher's guided path would end.

    f(x_t, t) = c_skip x_t + c_out x0(x_t, t)          f(x_0, 0) = x_0
    loss = E d(f(x_t, t), f(x_s, s) without gradient)  x_s: one DDIM step of the guided teacher from x_t

with d(a, b) = sqrt(|a - b|^2 + c^2) - c, the pseudo-Huber distance (Song et al. 2023, Consistency Models; Luo et al.
2023, Latent Consistency Models, algorithm 1). The teacher's guidance is inside the student, which is drawn without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.parametrization import Network, boundary, parametrization_named
from latentdiff.diffusion.path import Path


class _Row(NamedTuple):
    """What is computed at a level: x_t = alpha x0 + sigma noise; x0 = skip x + out F; f = c_skip x + c_out x0."""

    alpha: float
    sigma: float
    time: float
    scale: float
    skip: float
    out: float
    c_skip: float
    c_out: float


class ConsistencyLoss:
    """The loss of the module between neighbours of a grid of levels, 0 the noisiest.

    guidance: the scale of the teacher's classifier-free guidance; 1 is none. huber: c per value.
    """

    def __init__(self, path: Path, prediction: str, *, steps: int, guidance: float, huber: float):
        self.path, self.steps, self._guidance, self._huber = path, steps, guidance, huber
        levels = [*path.levels(steps, "distilled" if path.whole else "trailing")[:-1], path.numbered(0)]
        coefficients = parametrization_named(prediction)
        rows = []
        for number, level in enumerate(levels):
            c = coefficients(level)
            ends = (1.0, 0.0) if number == steps else boundary(level.t)
            rows.append(_Row(level.alpha, level.sigma, c.time, c.scale, c.skip, c.out, *ends))
        self._table = torch.tensor(rows, dtype=torch.float64).float()

    def number(self, t: float) -> int:
        """The place in the grid that a training time of the path stands for."""
        return min(int((1 - (t + 1) / self.path.T) * self.steps), self.steps - 1)

    def __call__(
        self, student: Network, teacher: Network, x0: Tensor, noise: Tensor, number: Tensor, cond: Any, uncond: Any
    ) -> Tensor:
        """x0 and noise (B, ...), number (B,) places in the grid, conditions with and without prompt -> losses (B,)."""
        at, after = self._rows(number, x0), self._rows(number + 1, x0)
        x = at.alpha * x0 + at.sigma * noise
        with torch.no_grad():
            guided = self._denoised(teacher, x, at, cond)
            if self._guidance != 1:
                free = self._denoised(teacher, x, at, uncond)
                guided = free + self._guidance * (guided - free)
            direction = (x - at.alpha * guided) / at.sigma
            nearer = after.alpha * guided + after.sigma * direction
            goal = self._jump(student, nearer, after, cond)
        error = (self._jump(student, x, at, cond) - goal).flatten(1)
        c = self._huber
        loss: Tensor = ((error**2 + c**2).sqrt() - c).mean(1)
        return loss

    def _jump(self, network: Network, x: Tensor, at: _Row, conditions: Any) -> Tensor:
        jumped: Tensor = at.c_skip * x + at.c_out * self._denoised(network, x, at, conditions)
        return jumped

    def _denoised(self, network: Network, x: Tensor, at: Any, conditions: Any) -> Tensor:
        output = network(at.scale * x, at.time.flatten(), conditions).float()
        denoised: Tensor = at.skip * x + at.out * output
        return denoised

    def _rows(self, number: Tensor, like: Tensor) -> Any:
        """The rows of places (B,), each value (B, 1, ...)."""
        self._table = self._table.to(like.device)
        return _Row(*self._table[number].T.reshape(len(_Row._fields), -1, *[1] * (like.ndim - 1)))
