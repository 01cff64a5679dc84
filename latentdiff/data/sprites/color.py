"""The main colour of a sprite, and the sprite in another colour.

A colour is a hue with a saturation and a brightness. A recoloured sprite keeps its shading: in the
main colour's pixels the hue moves by a constant, saturation and brightness by constant factors, so that their means are
the new colour's.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from latentdiff.data.scenes import COLORS

NEW_COLORS = tuple(COLORS)
_HUES = {"red": 0, "orange": 32, "yellow": 51, "green": 120, "cyan": 186, "blue": 222, "purple": 278}
_WINDOW = 28 / 360  # how far from the main hue its pixels may be
_SHARE = 0.6  # of the visible pixels: the least that the main colour has
_VIVID = 0.35  # saturation and brightness below which a pixel has no hue


def _planes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, saturation and brightness in [0, 1] of uint8 (H, W, 3)."""
    planes = np.asarray(Image.fromarray(rgb).convert("HSV"), np.float32) / 255
    return planes[..., 0], planes[..., 1], planes[..., 2]


def _main(rgba: np.ndarray) -> tuple[float, np.ndarray, np.ndarray] | None:
    """The main hue, the mask of its pixels, and their weights; None if no colour prevails."""
    hue, saturation, value = _planes(np.ascontiguousarray(rgba[..., :3]))
    weight = rgba[..., 3] / np.float32(255)
    vivid = weight * ((saturation > _VIVID) & (value > _VIVID))
    if not vivid.any():
        return None
    counts = np.bincount((hue * 72).astype(int).ravel() % 72, vivid.ravel(), 72)
    smooth = sum(np.roll(counts, k) for k in range(-3, 4))
    centre = (float(np.argmax(smooth)) + 0.5) / 72
    near = np.abs((hue - centre + 0.5) % 1 - 0.5) < _WINDOW
    chosen = vivid * near
    if chosen.sum() < _SHARE * weight.sum():
        return None
    angle = np.exp(2j * np.pi * hue)
    return float(np.angle((chosen * angle).sum()) / (2 * np.pi) % 1), near & (saturation > _VIVID / 2), chosen


def main_color(rgba: np.ndarray) -> str:
    """The name of the main colour of uint8 (H, W, 4); "" if none prevails."""
    main = _main(rgba)
    if main is None:
        return ""
    hue, _, weights = main
    _, saturation, value = _planes(np.ascontiguousarray(rgba[..., :3]))
    s, v = (float((weights * plane).sum() / weights.sum()) for plane in (saturation, value))
    degrees = hue * 360
    if 300 < degrees < 346 or ((degrees > 340 or degrees < 12) and s < 0.6 and v > 0.75):
        return "pink"
    if 10 < degrees < 45 and v < 0.82:
        return "brown"
    return min(_HUES, key=lambda name: abs((degrees - _HUES[name] + 180) % 360 - 180))


def recolored(rgba: np.ndarray, color: str) -> np.ndarray:
    """uint8 (H, W, 4) with its main colour changed to one of `NEW_COLORS`; unchanged if no colour prevails."""
    main = _main(rgba)
    if main is None:
        return rgba
    old_hue, mask, weights = main
    hue, saturation, value = _planes(np.ascontiguousarray(rgba[..., :3]))
    new_hue, new_saturation, new_value = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLORS[color]))
    means = [float((weights * plane).sum() / weights.sum()) for plane in (saturation, value)]
    planes = [
        np.where(mask, (hue + new_hue - old_hue) % 1, hue),
        np.where(mask, np.minimum(saturation * (new_saturation / means[0]), 1), saturation),
        np.where(mask, np.minimum(value * (new_value / means[1]), 1), value),
    ]
    packed = np.rint(np.stack(planes, -1) * 255).astype(np.uint8)
    rgb = np.asarray(Image.fromarray(packed, "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], -1)
