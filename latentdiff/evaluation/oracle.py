"""The exact oracle of the scenes: it reads objects from a picture and compares them with a description.

A pixel is background + alpha (color - background) for the one palette colour whose line it lies nearest
to. Connected components of alpha > 1/2 of one colour are objects; an object's shape is the one whose
rendered coverage, at the same place and size, overlaps it best.
Reading is strict: a picture with anything that is not an object satisfies no prompt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from latentdiff.data.scenes import BACKGROUNDS, COLORS, RADII, SHAPES, SIZE, Description, Thing, coverage, holds
from latentdiff.evaluation.objects import background_of

MIN_AREA = 24  # pixels; smaller specks are a decoder's noise, the smallest object has about 60
NEAR = 40.0  # of 255, in RGB: the distance within which two colours have one name
MIN_OVERLAP = 0.7  # intersection over union of soft masks; below it the shape is unknown
_PALETTE = np.array(list(COLORS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Reading:
    """The objects in a picture. An object of unknown shape has the shape "unknown"."""

    background: str
    things: tuple[Thing, ...]


def read(image: NDArray[np.uint8]) -> Reading:
    """Read a picture uint8 (S, S, 3), S >= 64, reduced to 64 x 64."""
    if len(image) != SIZE:
        image = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX))
    ground = background_of(image)
    alpha, color = _unmix(image.astype(np.float32), ground)
    things = []
    for c, name in enumerate(COLORS):
        labels, count = ndimage.label((alpha > 0.5) & (color == c))
        for k in range(1, count + 1):
            mask = labels == k
            if mask.sum() >= MIN_AREA:
                things.append(_fit(np.where(ndimage.binary_dilation(mask, iterations=2), alpha, 0), mask, name))
    return Reading(_name(ground.mean((0, 1))), tuple(things))


def _name(ground: NDArray[np.float32]) -> str:
    """The background of that colour; "" for another colour."""
    apart = np.linalg.norm(_GROUNDS - ground, axis=1)
    return list(BACKGROUNDS)[int(apart.argmin())] if apart.min() < NEAR else ""


def _unmix(pixels: NDArray[np.float32], ground: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Per pixel the alpha in [0, 1] and the palette index whose segment from the background is nearest."""
    offset, lines = (pixels - ground)[..., None, :], _PALETTE - ground[..., None, :]
    lengths = (lines**2).sum(-1)
    alpha = np.clip((offset * lines).sum(-1) / np.maximum(lengths, 1), 0, 1)
    residual = np.linalg.norm(offset - alpha[..., None] * lines, axis=-1)
    color = np.where(lengths < NEAR**2, np.inf, residual).argmin(-1)  # an object of the background's colour is unseen
    return np.take_along_axis(alpha, color[..., None], -1)[..., 0], color


def _fit(alpha: NDArray[np.float32], mask: NDArray[np.bool_], color: str) -> Thing:
    """The shape, position and size whose coverage has the largest intersection over union with `alpha`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    best, best_overlap = Thing("unknown", color, (left + right) / 2, (top + bottom) / 2, 0.0), MIN_OVERLAP
    for shape in SHAPES:
        below, half_height, half_width = _EXTENT[shape]
        for nudge in (-0.5, 0.0, 0.5):
            radius = ((right - left) / half_width + (bottom - top) / half_height) / 4 + nudge
            x, y = (left + right) / 2, (top + bottom) / 2 - below * radius
            ideal = coverage(shape, x, y, radius, SIZE, SIZE)
            overlap = float(np.minimum(ideal, alpha).sum() / np.maximum(ideal, alpha).sum())
            if overlap > best_overlap:
                best, best_overlap = Thing(shape, color, float(x), float(y), float(radius)), overlap
    return best


# The bounding box of each shape of radius 1: how far its centre is below the shape's, half height, half width.
_EXTENT = {
    "circle": (0.0, 1.0, 1.0),
    "square": (0.0, 0.9, 0.9),
    "triangle": (-0.1, 0.9, 0.9),
    "star": (-0.0955, 0.9045, 0.9511),
    "ring": (0.0, 1.0, 1.0),
    "cross": (0.0, 1.0, 1.0),
}


def satisfies(reading: Reading, description: Description) -> bool:
    """Whether a picture shows everything in the description and no other object."""
    described = Counter({(g.shape, g.color): g.count for g in description.groups})
    if Counter((t.shape, t.color) for t in reading.things) != described:
        return False
    if description.background and reading.background != description.background:
        return False
    if description.size and _size(reading.things[0]) != description.size:
        return False
    if description.place is not None and _place(reading.things[0]) != description.place:
        return False
    return not description.relation or _related(reading, description)


def _size(thing: Thing) -> str:
    """The word of size whose range of radii is nearest."""
    return min(RADII, key=lambda size: abs(thing.radius - sum(RADII[size]) / 2))


def _place(thing: Thing) -> tuple[int, int]:
    """The cell of the 3 x 3 grid; the threshold lies between the offsets that `layout` draws."""

    def side(offset: float) -> int:
        return 0 if abs(offset) < 4.5 else (1 if offset > 0 else -1)

    return side(thing.x - SIZE / 2), side(thing.y - SIZE / 2)


def _related(reading: Reading, description: Description) -> bool:
    first, second = (
        next(t for t in reading.things if (t.shape, t.color) == (g.shape, g.color)) for g in description.groups
    )
    return holds(description.relation, (first.x, first.y), (second.x, second.y))
