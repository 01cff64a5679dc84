"""Annotators make the pictures that controls read: edges, blurred, grey, tiles, colours, segments.

Each takes uint8 (H, W, 3) and returns the same shape, and depends on nothing else. Libraries are imported on use,
because the settings of a training import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from latentdiff.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Annotator = Callable[["np.ndarray"], "np.ndarray"]
EDGE_LOW, EDGE_HIGH = 100, 200  # Canny's thresholds, as in ControlNet's examples (Zhang et al. 2023)
TILE, PALETTE = 8, 16  # pixels of a side
SEGMENTS = 8  # colours


def canny(pixels: np.ndarray) -> np.ndarray:
    """White edges on black (Canny 1986), by OpenCV."""
    import cv2

    return _coloured(cv2.Canny(_grey(pixels), EDGE_LOW, EDGE_HIGH))


def blur(pixels: np.ndarray) -> np.ndarray:
    """Blurred by a Gaussian whose radius is a fiftieth of the shorter side."""
    import numpy as np
    from PIL import Image, ImageFilter

    radius = min(pixels.shape[:2]) / 50
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def grey(pixels: np.ndarray) -> np.ndarray:
    """Without colours."""
    return _coloured(_grey(pixels))


def tile(pixels: np.ndarray) -> np.ndarray:
    """An eighth of the size, enlarged again: what a picture shows from far away."""
    return _coarse(pixels, TILE, smooth=True)


def palette(pixels: np.ndarray) -> np.ndarray:
    """Squares of 16 pixels, each of its mean colour."""
    return _coarse(pixels, PALETTE, smooth=False)


def segments(pixels: np.ndarray) -> np.ndarray:
    """Areas in the eight colours that represent the picture best (median cut, Heckbert 1982)."""
    import numpy as np
    from PIL import Image

    reduced = Image.fromarray(pixels).quantize(SEGMENTS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return np.asarray(reduced.convert("RGB"))


ANNOTATORS: dict[str, Annotator] = {
    "canny": canny,
    "blur": blur,
    "grey": grey,
    "tile": tile,
    "palette": palette,
    "segments": segments,
}


def annotator(kind: str) -> Annotator:
    """The annotator of that name. Raises ConfigError."""
    if kind not in ANNOTATORS:
        raise ConfigError(f"unknown annotator {kind[:40]!r}; one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[kind]


def _grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W)."""
    import numpy as np

    from latentdiff.core.images import luminance

    return np.ascontiguousarray(luminance(pixels).reshape(pixels.shape[:2]))


def _coloured(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.repeat(values[..., None], 3, -1)


def _coarse(pixels: np.ndarray, side: int, *, smooth: bool) -> np.ndarray:
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(pixels)
    width, height = picture.size
    small = picture.resize((max(1, width // side), max(1, height // side)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST))
