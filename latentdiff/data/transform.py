"""A view of a picture: its largest part with the bucket's aspect, resized in one step, optionally flipped.

Cropping before resizing avoids a rounded intermediate size: the part's corners may lie between pixels, and the Lanczos
filter is evaluated there. It reads nothing outside the part.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from latentdiff.data.buckets import Size

CENTER = (0.5, 0.5)


def view(pixels: np.ndarray, size: Size, at: tuple[float, float] = CENTER, flipped: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) -> (*size, 3). `at` in [0, 1]^2 is where the part lies: (0, 0) top left, (1, 1) bottom right."""
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1])  # source pixels a pixel of the view
    part = (min(size[0] * scale, height), min(size[1] * scale, width))  # rounding may pass the border
    top, left = (height - part[0]) * at[0], (width - part[1]) * at[1]
    if (height, width) != size:
        box = (left, top, min(left + part[1], width), min(top + part[0], height))
        pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS, box))
    return pixels[:, ::-1] if flipped else pixels


def corner(whole: Size, size: Size, at: tuple[float, float] = CENTER, flipped: bool = False) -> tuple[int, int]:
    """(top, left) of the part that `view` shows, in pixels of the view; mirrored, from the mirrored picture's left."""
    scale = min(whole[0] / size[0], whole[1] / size[1])
    top, left = ((side / scale - view) * place for side, view, place in zip(whole, size, at, strict=True))
    return round(top), round(whole[1] / scale - size[1] - left if flipped else left)


def place_by_content(identifier: str) -> tuple[float, float]:
    """The place in [0, 1]^2 of a picture's crop, from its sha256: the same in every epoch and for every path."""
    return int(identifier[:8], 16) / 0xFFFFFFFF, int(identifier[8:16], 16) / 0xFFFFFFFF
