"""Guidance: functions from denoisers to denoisers. Networks and samplers have never heard of it.

The first argument of those that compare conditions is a denoiser of two contexts at once, unconditional first,
which returns both in one batch, (2, B, C, h, w).
"""

from __future__ import annotations

import math

from latentdiff.diffusion.denoiser import Array, Denoiser
from latentdiff.diffusion.schedule import NoiseLevel


def classifier_free(both: Denoiser, scale: float) -> Denoiser:
    """Uncond + scale (cond - uncond); scale 1 is the conditional model (Ho & Salimans 2022, eq. 6).

    Guiding x0 is guiding epsilon or v: at one level all three are affine in each other.
    """

    def denoise(x: Array, level: NoiseLevel) -> Array:
        uncond, cond = both(x, level)
        return uncond + scale * (cond - uncond)

    return denoise


def rescaled(both: Denoiser, scale: float, share: float) -> Denoiser:
    """Classifier-free guidance pulled back to the conditional standard deviation (Lin et al. 2023, eq. 15-16).

    The deviation is taken over each picture's predicted x0; `share` in [0, 1] is the mixing factor phi.
    """

    def denoise(x: Array, level: NoiseLevel) -> Array:
        uncond, cond = both(x, level)
        guided = uncond + scale * (cond - uncond)
        flat = (len(x), -1)
        wanted, found = cond.reshape(flat).std(1), guided.reshape(flat).std(1)
        constant = found == 0  # as where an epsilon network says nothing of x0, at zero SNR: nothing to rescale
        ratio = (wanted + constant) / (found + constant)
        factor = share * ratio + (1 - share)
        return guided * factor.reshape(len(x), *[1] * (x.ndim - 1))

    return denoise


def within(guided: Denoiser, plain: Denoiser, lowest: float = -math.inf, highest: float = math.inf) -> Denoiser:
    """`guided` where lowest <= log-SNR <= highest, `plain` elsewhere (Kynkaanniemi et al. 2024)."""

    def denoise(x: Array, level: NoiseLevel) -> Array:
        return (guided if lowest <= level.log_snr <= highest else plain)(x, level)

    return denoise
