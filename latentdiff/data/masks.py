"""Random masks for the training of inpainting models: boxes, strokes, sides, and everything."""

from __future__ import annotations

import numpy as np

from latentdiff.data.buckets import Size

WHOLE = 0.25  # share of masks of everything, as in Stable Diffusion's inpainting models


def random_mask(rng: np.random.Generator, size: Size) -> np.ndarray:
    """A mask, uint8 (height, width), 255 in the part to fill in, which is never empty."""
    mask = np.zeros(size, np.uint8)
    kind = rng.random()
    if kind < WHOLE:
        mask[:] = 255
    elif kind < 0.5:
        _box(mask, rng)
    elif kind < 0.6:
        _side(mask, rng)
    else:
        _strokes(mask, rng)
    return mask


def _box(mask: np.ndarray, rng: np.random.Generator) -> None:
    """One to three rectangles, each of a fifth to two thirds of the sides."""
    height, width = mask.shape
    for _ in range(rng.integers(1, 4)):
        h, w = (max(1, int(side * rng.uniform(0.2, 0.67))) for side in (height, width))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        mask[top : top + h, left : left + w] = 255


def _side(mask: np.ndarray, rng: np.random.Generator) -> None:
    """A part along one side, as outpainting has it."""
    turned = np.rot90(mask, int(rng.integers(4)))  # a view
    turned[: max(1, int(len(turned) * rng.uniform(0.2, 0.7)))] = 255


def _strokes(mask: np.ndarray, rng: np.random.Generator) -> None:
    """Wandering strokes of a brush."""
    height, width = mask.shape
    y, x = np.indices(mask.shape)
    for _ in range(rng.integers(1, 4)):
        place, angle = rng.uniform((0, 0), (height, width)), rng.uniform(0, 2 * np.pi)
        radius = max(1.0, min(height, width) * rng.uniform(0.05, 0.15))
        for _ in range(rng.integers(4, 12)):
            mask[(y - place[0]) ** 2 + (x - place[1]) ** 2 <= radius**2] = 255
            angle += rng.normal(0, 0.7)
            place = np.clip(place + radius * np.array([np.sin(angle), np.cos(angle)]), 0, (height - 1, width - 1))
