"""The consistency function of a network: a jump from any level to x0 (Song et al. 2023, Consistency Models, eq. 5).

f(x_t, t) = c_skip x_t + c_out x0(x_t, t)          f(x_0, 0) = x_0
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Network, boundary, parametrization_named


class Row(NamedTuple):
    """The numbers of a level: x_t = alpha x0 + sigma noise; x0 = skip x + out F(scale x, time); c_skip and c_out."""

    alpha: float
    sigma: float
    time: float
    scale: float
    skip: float
    out: float
    c_skip: float
    c_out: float


def row_of(level: NoiseLevel, prediction: str, *, is_end: bool = False) -> Row:
    """The numbers of a level. is_end: f is the identity there, whatever its time."""
    c = parametrization_named(prediction)(level)
    ends = (1.0, 0.0) if is_end else boundary(level.t)
    return Row(level.alpha, level.sigma, c.time, c.scale, c.skip, c.out, *ends)


def columns(rows: Tensor, like: Tensor) -> Any:
    """Rows (B, 8) as one Row of tensors (B, 1, ...) that multiply `like` (B, ...)."""
    return Row(*rows.to(like.device).T.reshape(len(Row._fields), -1, *[1] * (like.ndim - 1)))


def denoised(network: Network, x: Tensor, at: Any, conditions: Any) -> Tensor:
    """x0 (B, ...) as the network predicts it from x (B, ...) at the levels `at`; see `columns`."""
    output = network(at.scale * x, at.time.flatten(), conditions).float()
    x0: Tensor = at.skip * x + at.out * output
    return x0


def jump(network: Network, x: Tensor, at: Any, conditions: Any) -> Tensor:
    """f(x_t, t), (B, ...)."""
    end: Tensor = at.c_skip * x + at.c_out * denoised(network, x, at, conditions)
    return end


def nearer(x: Tensor, x0: Tensor, at: Any, after: Any) -> Tensor:
    """The DDIM step from x at one level to another, along the line to x0: alpha x0 + sigma noise, with the same noise.

    (Song et al. 2021, Denoising Diffusion Implicit Models, eq. 12, with eta = 0.)
    """
    noise = (x - at.alpha * x0) / at.sigma
    step: Tensor = after.alpha * x0 + after.sigma * noise
    return step


def distance(a: Tensor, b: Tensor, c: float) -> Tensor:
    """The pseudo-Huber distance of values, sqrt((a - b)^2 + c^2) - c, (B, ...)."""
    apart: Tensor = ((a - b) ** 2 + c**2).sqrt() - c
    return apart


def table(levels: list[NoiseLevel], prediction: str) -> Tensor:
    """The rows of a grid of levels, at whose last f is the identity, (N, 8)."""
    rows = [row_of(level, prediction, is_end=number == len(levels) - 1) for number, level in enumerate(levels)]
    return torch.tensor(rows, dtype=torch.float64).float()
