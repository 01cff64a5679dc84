"""Aspect-ratio buckets (NovelAI 2022): pictures of like shape are resized to one size, so that little is cropped.

The sides of a bucket are multiples of a step. The table has the largest sizes with at most resolution^2 pixels and an
aspect within a limit; a picture goes to the bucket whose aspect is nearest by ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentdiff.core.errors import ConfigError

Size = tuple[int, int]  # (height, width)


def bucket_table(resolution: int, step: int | None = None, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Sizes (height, width), tall to wide; without a step only the square. Raises ConfigError."""
    if step is None:
        return ((resolution, resolution),)
    if step > resolution:
        raise ConfigError(f"bucket_step must be at most the resolution {resolution} (got {step})")
    area, sizes = resolution * resolution, set()
    for short in range(step, resolution + 1, step):
        long = area // short // step * step
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise ConfigError(f"no bucket of step {step} fits a resolution of {resolution} within {max_aspect:g} to 1")
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def nearest(size: Size, table: Sequence[Size]) -> Size:
    """The bucket of a picture: the one with the nearest aspect, then with the most pixels."""
    aspect = math.log(size[1] / size[0])
    return min(table, key=lambda other: (abs(math.log(other[1] / other[0]) - aspect), -other[0] * other[1]))


def cropped_share(size: Size, bucket: Size) -> float:
    """The share of a picture's area that cropping to the bucket's aspect removes."""
    ratio = (size[1] / size[0]) / (bucket[1] / bucket[0])
    return 1 - min(ratio, 1 / ratio)
