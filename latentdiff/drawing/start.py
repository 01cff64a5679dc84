"""The start of sampling: the noise, the levels of the walk, and the part of an input picture that stays.

Every draw is keyed by the picture's own seed, draws of steps by (seed, step): they do not depend on the rest of the
batch or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from latentdiff.core.arrays import Array, Put, library
from latentdiff.diffusion import noise
from latentdiff.diffusion.process import diffuse
from latentdiff.diffusion.samplers import Levels
from latentdiff.drawing.batch import Job

if TYPE_CHECKING:
    import torch


class Draw(Protocol):
    """(purpose, step) -> standard normal noise (B, C, h, w)."""

    def __call__(self, purpose: str, step: int = 0) -> Array:
        """The noise of a purpose at a step."""
        ...


@dataclass(frozen=True)
class Start:
    """The start of a pass: x at levels[0], and the latents and the mask of an input picture of which a part stays.

    known: (B, C, h, w); mask: (B, 1, h, w), 1 in the part to draw, between 0 and 1 on its soft edge. extra: channels
    that an inpainting network reads. context: (B, C, h, w), the latents of the picture that an editing network reads.
    walk: all levels, if several models share them and these are a part.
    """

    x: Array
    levels: Levels
    known: Array | None = None
    mask: Array | None = None
    extra: Array | None = None
    context: Array | None = None
    walk: Levels = ()

    @property
    def beside(self) -> Array | None:
        """The channels that the network reads beside x, if any."""
        return self.extra if self.context is None else self.context


def keyed(jobs: Sequence[Job], shape: tuple[int, ...], put: Put) -> Draw:
    """Draws keyed by the seeds of the jobs; the first noise may be turned towards a variation's."""

    def draw(purpose: str, step: int = 0) -> Array:
        return put(np.stack([_noise(job, shape, purpose, step) for job in jobs]))

    return draw


def generated(generators: Sequence[torch.Generator], shape: tuple[int, ...], put: Put) -> Draw:
    """Draws from the caller's generators, one for each picture or one for all, in the order of use."""
    import torch

    def draw(purpose: str, step: int = 0) -> Array:
        rows = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
        return put(torch.stack(rows))

    return draw


def _noise(job: Job, shape: tuple[int, ...], purpose: str, step: int) -> np.ndarray:
    request = job.request
    if request.variation_seed is None:
        return noise.normal(shape, job.seed, purpose, step=step)
    base = noise.normal(shape, request.seed, purpose, step=step)
    other = noise.normal(shape, request.variation_seed + job.index, purpose, step=step)
    return turned(base, other, request.variation_strength)


def turned(base: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """A share of the way from one noise to another along the great circle, where noise keeps its length."""
    a, b = base.ravel().astype(np.float64), other.ravel().astype(np.float64)
    cosine = np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    angle = math.acos(cosine)
    if angle < 1e-6 or math.pi - angle < 1e-6:
        return base
    mixed = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    return np.asarray(mixed, np.float32).reshape(base.shape)


def from_latents(
    levels: Levels, noise: Array, known: Array, mask: Array | None = None, *, fresh: bool = False
) -> Start:
    """A start from an input picture, noised to the first level.

    mask: (B, 1, h, w), 1 in the part to draw, None for all of it. fresh: that part starts from noise alone.
    """
    x = diffuse(known, noise, levels[0])
    if mask is None:
        return Start(x, levels)
    return Start(library(x).where(mask == 1, noise, x) if fresh else x, levels, known, mask)


def latent_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """uint8 (H, W) -> float32 (1, 1, h, w) in [0, 1]: the largest value of the pixels under a latent."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(blocks.max((1, 3)) / np.float32(255), np.float32)[None, None]
