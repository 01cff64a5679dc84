"""The consistency function of a network: a jump from any level to x0 (Song et al. 2023, Consistency Models, eq. 5).

f(x_t, t) = c_skip x_t + c_out x0(x_t, t)          f(x_0, 0) = x_0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Network, boundary, parametrization_named
from latentdiff.diffusion.path import Path

LARGEST_RATIO = 80.0  # EDM's largest noise level


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


def row_of(level: NoiseLevel, prediction: str) -> Row:
    """The numbers of a level; at the end f is the identity, whatever its time."""
    c = parametrization_named(prediction)(level)
    ends = boundary(level.t) if level.sigma else (1.0, 0.0)
    return Row(level.alpha, level.sigma, c.time, c.scale, c.skip, c.out, *ends)


def table(levels: Sequence[NoiseLevel], prediction: str) -> Tensor:
    """The rows of levels, (N, 8)."""
    return torch.tensor([row_of(level, prediction) for level in levels], dtype=torch.float64).float()


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


def ddim_step(x: Tensor, x0: Tensor, at: Any, after: Any) -> Tensor:
    """The DDIM step from x at one level to another, along the line to x0: alpha x0 + sigma noise, with the same noise.

    (Song et al. 2021, Denoising Diffusion Implicit Models, eq. 12, with eta = 0.)
    """
    noise = (x - at.alpha * x0) / at.sigma
    step: Tensor = after.alpha * x0 + after.sigma * noise
    return step


def distance(a: Tensor, b: Tensor, huber: float) -> Tensor:
    """The pseudo-Huber distance of pictures, sqrt(|a - b|^2 + c^2) - c with c = huber sqrt(number of values), (B,).

    (Song and Dhariwal 2024, Improved Techniques for Training Consistency Models, section 3.3.) With a distance for each
    value, small errors would weigh as much as large ones.
    """
    c = huber * a[0].numel() ** 0.5
    apart: Tensor = ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c
    return apart


def ratio_difference(at: Any, after: Any) -> Tensor:
    """The difference of the noise-to-signal ratios r = sigma / alpha of two levels, (B,).

    A path may end without signal, so r is at most 80 at the first level, EDM's largest, and at most 40 at the second.
    """
    high, low = ((row.sigma / row.alpha).flatten() for row in (at, after))
    return (high.clamp(max=LARGEST_RATIO) - low.clamp(max=LARGEST_RATIO / 2)).clamp(min=1e-6)


def pair_loss(student: Network, x: Tensor, x0: Tensor, at: Any, after: Any, cond: Any, huber: float) -> Tensor:
    """1 / (r_t - r_s) d(f(x_t, t), f(x_s, s) without gradient), (B,), with x_s on the line from x_t to x0."""
    with torch.no_grad():
        goal = jump(student, ddim_step(x, x0, at, after), after, cond)
    return distance(jump(student, x, at, cond), goal, huber) / ratio_difference(at, after)


def scale_of(usual: float, each: Tensor | None, like: Tensor) -> Any:
    """The scale of guidance that multiplies `like` (B, ...): of each sample (B,), or the usual one; None for none."""
    if each is None:
        return None if usual == 1 else usual
    return each.reshape(-1, *[1] * (like.ndim - 1))


def clean_level(path: Path) -> NoiseLevel:
    """The end of a jump: the data without noise, at the time of the path's least noisy level.

    A path's own last level has some noise, which a student would learn to draw.
    """
    return NoiseLevel(path.numbered(0).t, 1.0, 0.0)
