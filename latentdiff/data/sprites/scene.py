"""A composed scene: a description, its captions, where each object is, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentdiff.data import scenes
from latentdiff.data.scenes import COLORS, RELATIONS, coverage
from latentdiff.data.sprites.captions import captions
from latentdiff.data.sprites.color import recolored
from latentdiff.data.sprites.description import GROUNDS, Description, Group
from latentdiff.data.sprites.library import Library

UNIT = scenes.SIZE  # the side of a scene in the units of `Thing`
_RADII = {"": 26.0, "large": 30.0}  # of a thing in the middle
_SMALL = (9.0, 13.0)
_IN_A_CELL = (10.0, 15.0)
_BESIDE = (10.0, 13.5)  # of two
_OF_MANY = {2: (10.0, 13.5), 3: (8.5, 12.0), 4: (8.0, 10.5)}


@dataclass(frozen=True)
class Thing:
    """One object: centre and half of its side, in 64ths of the picture's side, x to the right, y down."""

    group: Group
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """See the module. angle: of the background's gradient, in radians."""

    description: Description
    captions: tuple[str, ...]
    things: tuple[Thing, ...]
    angle: float


def compose(description: Description, rng: np.random.Generator) -> Scene:
    """Captions of a description and a layout that satisfies it."""
    sentences = captions(description, rng)
    return Scene(description, sentences, layout(description, rng), rng.uniform(0, 2 * math.pi))


def layout(description: Description, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Objects in general position that satisfy the description."""
    groups = [group for group in description.groups for _ in range(group.count)]
    if len(groups) == 1:
        radius, center = _alone(description, rng)
        radii, centers = [radius], [center]
    elif len(description.groups) == 2:
        radii = list(rng.uniform(*_BESIDE, 2))
        centers = scenes.related(description.relation or RELATIONS[rng.integers(4)], radii, rng)
    else:
        radii = [rng.uniform(*_OF_MANY[len(groups)])] * len(groups)
        centers = scenes.scattered(radii, rng)
    return tuple(
        Thing(group, float(x), float(y), float(r)) for group, (x, y), r in zip(groups, centers, radii, strict=True)
    )


def _alone(description: Description, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    """Radius and centre of a single thing. A large one without a place is in the middle, always of the same size:
    a network then learns what it looks like, and nothing else.
    """
    if description.place is not None:
        radius = rng.uniform(*_IN_A_CELL)
        return radius, scenes.in_cell(description.place, radius, rng)
    if description.size in _RADII:
        return _RADII[description.size], (UNIT / 2, UNIT / 2)
    radius = rng.uniform(*_SMALL)
    x, y = UNIT / 2 + rng.uniform(radius - UNIT / 2, UNIT / 2 - radius, 2)
    return radius, (x, y)


def render(scene: Scene, library: Library, size: int) -> np.ndarray:
    """The picture, uint8 (size, size, 3)."""
    picture = background(scene.description.background, scene.angle, size)
    for thing in scene.things:
        side = max(round(2 * thing.radius * size / UNIT), 2)
        sprite = _pixels(thing.group, library, side)
        left, top = (round(centre * size / UNIT - side / 2) for centre in (thing.x, thing.y))
        _paste(picture, sprite, left, top)
    return picture


def background(colors: Sequence[str], angle: float, size: int) -> np.ndarray:
    """One colour, or a linear gradient from the first to the second: uint8 (size, size, 3)."""
    first, last = (np.array(GROUNDS[name], np.float32) for name in (colors[0], colors[-1]))
    if len(colors) == 1:
        return np.tile(first.astype(np.uint8), (size, size, 1))
    place = np.arange(size, dtype=np.float32) / (size - 1) - np.float32(0.5)
    along = np.float32(math.cos(angle)) * place + np.float32(math.sin(angle)) * place[:, None]
    share = np.clip(along + np.float32(0.5), 0, 1)[..., None]
    return np.rint(first * (1 - share) + last * share).astype(np.uint8)


def _pixels(group: Group, library: Library, side: int) -> np.ndarray:
    """An object as uint8 (side, side, 4)."""
    if group.sprite is None:
        return shape_pixels(group.name, group.color, side)
    image = Image.fromarray(library.pixels(group.sprite.row))
    pixels = np.asarray(image.resize((side, side), Image.Resampling.HAMMING))  # Lanczos leaves specks around edges
    return recolored(pixels, group.color) if group.is_recolored else pixels


def shape_pixels(name: str, color: str, side: int) -> np.ndarray:
    """A shape as uint8 (side, side, 4), transparent around it."""
    alpha = coverage(name, side / 2, side / 2, side / 2 - 0.5, side, side)[..., None]
    rgb = np.broadcast_to(np.array(COLORS[color], np.uint8), (side, side, 3))
    return np.concatenate([rgb, np.rint(alpha * 255).astype(np.uint8)], -1)


def _paste(picture: np.ndarray, sprite: np.ndarray, left: int, top: int) -> None:
    """Lay a sprite over the picture; what lies outside is cut off."""
    size, side = len(picture), len(sprite)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha, window = part[..., 3:].astype(np.float32) / 255, picture[y0:y1, x0:x1]
    window[:] = np.rint(window + alpha * (part[..., :3] - window.astype(np.float32)))
