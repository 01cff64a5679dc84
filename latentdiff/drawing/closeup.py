"""Redrawing a part of a picture at the model's own size: the masked part is cut out, drawn, and put back.

A face of 40 pixels in a large picture is then drawn with as many pixels as a whole picture. A1111 calls this "only
masked", diffusers `padding_mask_crop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from latentdiff.core.arrays import Array, to_numpy


class Box(NamedTuple):
    """A part of a picture in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """The part of (H, W, ...)."""
        return pixels[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, eq=False)
class Closeup:
    """The whole picture, uint8 (H, W, 3), its mask, uint8 (H, W), and the part that is drawn."""

    pixels: np.ndarray
    mask: np.ndarray
    box: Box

    def put_back(self, image: Array) -> np.ndarray:
        """Values (C, H, W) in the whole picture, with the drawn part (C, h, w) resized to its box; elsewhere 0."""
        width, height = self.box.right - self.box.left, self.box.bottom - self.box.top
        whole = np.zeros((len(image), *self.mask.shape), np.float32)
        for channel, values in zip(whole, to_numpy(image), strict=True):
            if values.shape != (height, width):
                resizable = Image.fromarray(values.astype(np.float32))
                values = np.asarray(resizable.resize((width, height), Image.Resampling.LANCZOS)).clip(-1, 1)
            self.box.of(channel)[:] = values
        return whole


def box_of(mask: np.ndarray, padding: int, size: tuple[int, int]) -> Box:
    """The masked part with `padding` pixels around it, grown to the aspect of `size`, (height, width).

    It stays inside the picture, and is moved or cut at its edge.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    (height, width), (bottom, right) = size, mask.shape
    top, low = max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, bottom)
    left, high = max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, right)
    if (high - left) * height > (low - top) * width:
        top, low = _grown(top, low, int((high - left) * height / width), bottom)
    else:
        left, high = _grown(left, high, int((low - top) * width / height), right)
    return Box(int(left), int(top), int(high), int(low))


def _grown(start: int, end: int, length: int, most: int) -> tuple[int, int]:
    """An interval grown on both sides to a length, inside (0, most)."""
    more = length - (end - start)
    start, end = start - more // 2, end + more - more // 2
    if end > most:
        start, end = start - (end - most), most
    if start < 0:
        start, end = 0, end - start
    return start, min(end, most)
