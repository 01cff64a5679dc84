"""The objects of a picture with a plain or graded background: the regions that differ from the background.

The background is a linear function of the place in each colour channel, fitted to the border. What differs from it is
an object; parts that nearly touch are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

_DIFFERENT = 28.0  # in one channel, of 255: above the noise of a decoder
_SPECK = 0.0015  # of the picture's area; smaller parts are noise
_LEAST = 16  # pixels of the border for a fit
_APART = 0.025  # of the side: parts nearer than this belong to one object


@dataclass(frozen=True)
class Region:
    """An object: the box (top, left, bottom, right) in pixels, and its mask in the whole picture, bool (H, W)."""

    box: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def centre(self) -> tuple[float, float]:
        """x to the right and y down, in pixels."""
        top, left, bottom, right = self.box
        return (left + right) / 2, (top + bottom) / 2


def united(parts: Sequence[Region]) -> Region:
    """Several objects as one."""
    boxes = np.array([part.box for part in parts])
    (top, left), (bottom, right) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return Region((int(top), int(left), int(bottom), int(right)), np.any([part.mask for part in parts], 0))


def background_of(picture: np.ndarray) -> np.ndarray:
    """The fitted background, float32 (H, W, 3), of uint8 (H, W, 3). Outliers at the border, objects, are left out."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    terms = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], -1)
    border = np.zeros((height, width), bool)
    border[:2] = border[-2:] = True
    border[:, :2] = border[:, -2:] = True
    rows, colors = terms[border], picture[border].astype(np.float32)
    fit = np.linalg.lstsq(rows, colors, rcond=None)[0]
    for limit in (60.0, 30.0, 20.0):
        use = np.abs(colors - rows @ fit).max(-1) < limit
        if use.sum() < _LEAST:
            break
        fit = np.linalg.lstsq(rows[use], colors[use], rcond=None)[0]
    return np.clip(terms @ fit, 0, 255)


def objects(picture: np.ndarray) -> list[Region]:
    """The objects of uint8 (H, W, 3), the largest first."""
    height, width = picture.shape[:2]
    different = np.abs(picture - background_of(picture)).max(-1) > _DIFFERENT
    reach = max(1, round(_APART * width / 2))
    grown = ndimage.binary_dilation(different, iterations=reach)
    labels, _ = ndimage.label(grown, np.ones((3, 3)))
    objects = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        mask = different & (labels == number)
        if mask.sum() < _SPECK * height * width:
            continue
        rows, columns = np.flatnonzero(mask[box].any(1)), np.flatnonzero(mask[box].any(0))
        top, left = box[0].start, box[1].start
        objects.append(Region((top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1), mask))
    return sorted(objects, key=lambda each: -int(each.mask.sum()))


def cropped(picture: np.ndarray, box: tuple[int, int, int, int], side: int, margin: float = 0.08) -> np.ndarray:
    """A square around a box with a margin, uint8 (side, side, 3); beyond the picture its border is repeated."""
    top, left, bottom, right = box
    half = max(bottom - top, right - left) * (0.5 + margin)
    y, x = (top + bottom) / 2, (left + right) / 2
    reach = int(np.ceil(half)) + 1
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), "edge")
    corners = (x - half + reach, y - half + reach, x + half + reach, y + half + reach)
    return np.asarray(Image.fromarray(padded).resize((side, side), Image.Resampling.BILINEAR, box=corners))
