"""The picture that drawing starts from, and its masked part, which is redrawn.

Sides that the networks cannot draw are padded with the edge's pixels, and the padding is cut off again: a picture keeps
its size, and the part outside the mask keeps its bits. On the soft edge of a mask the drawn picture and the given one
are mixed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from latentdiff.core.arrays import Array, Put, library
from latentdiff.core.decoding import WHITE, Color, rgb
from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.images import luminance, to_values
from latentdiff.drawing.closeup import Closeup, box_of
from latentdiff.drawing.request import LONGEST


class Margins(NamedTuple):
    """Pixels added on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


NONE = Margins()
BLACK = (0, 0, 0)  # under a transparent mask: nothing is drawn there
HALF = 128  # of a mask's value
_ALMOST = 8  # mask values this near to black or white count as black or white: JPEG changes them


@dataclass(frozen=True, eq=False)
class Canvas:
    """pixels: uint8 (H, W, 3), padded; without padding it has `size`, (height, width) from the upper left.

    mask: uint8 (H, W), 255 in the part to redraw, between on its soft edge; None to draw over the whole picture.
    closeup: the whole picture, if only its masked part is drawn. enlarged: the factor by which the finished picture
    is larger.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    size: tuple[int, int]
    margins: Margins
    names: tuple[str | None, str | None] = (None, None)  # file names of picture and mask, if known
    closeup: Closeup | None = None
    enlarged: int = 1

    @property
    def final(self) -> tuple[int, int]:
        """(height, width) of the finished picture."""
        if self.closeup is not None:
            height, width = self.closeup.mask.shape
            return height, width
        return self.enlarged * self.size[0], self.enlarged * self.size[1]

    def kept(self, image: Array, put: Put) -> Array:
        """A drawn image (C, H, W) with the input's pixels outside the mask, without padding."""
        if self.closeup is not None:
            inside = image[:, : self.size[0], : self.size[1]]
            return _mixed(put(self.closeup.put_back(inside)), self.closeup.pixels, self.closeup.mask, put)
        if self.mask is not None:
            image = _mixed(image, self.pixels, self.mask, put)
        return image[:, : self.final[0], : self.final[1]]

    @property
    def hash(self) -> str:
        """sha256 of the pixels and the mask, which identifies the picture."""
        if self.closeup is not None:
            whole = Canvas(self.closeup.pixels, self.closeup.mask, self.final, self.margins)
            return hashlib.sha256(f"{whole.hash} {self.closeup.box} {self.size}".encode()).hexdigest()
        digest = hashlib.sha256(repr((self.pixels.shape, self.size, self.mask is None)).encode())
        digest.update(self.pixels.tobytes())
        if self.mask is not None:
            hard = not ((self.mask > 0) & (self.mask < 255)).any()
            digest.update((self.mask == 255 if hard else self.mask).tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """The entry in the record of a picture that was made from it."""
        return {"image": self.names[0], "mask": self.names[1], "outpaint": self.margins, "sha256": self.hash}


def canvas(
    image: Any,
    mask: Any = None,
    *,
    multiple: int,
    size: tuple[int | None, int | None] = (None, None),
    margins: Margins = NONE,
    names: tuple[str | None, str | None] = (None, None),
    blur: float = 0.0,
    closeup: tuple[int, tuple[int, int]] | None = None,
) -> Canvas:
    """A canvas from a PIL image or uint8 (H, W, 3), and a mask of the same size, white or True in the part to redraw.

    size: (height, width) to resize to, None for the image's; margins: pixels to add around it. blur: the standard
    deviation in pixels by which the mask's edge is softened. closeup: only the masked part is drawn, with so many
    pixels around it, at a size (height, width). Raises ConfigError.
    """
    pixels = pixels_of(image)
    marked = None if mask is None else _marked(mask, pixels.shape[:2])
    height, width = (own if side is None else side for side, own in zip(size, pixels.shape[:2], strict=True))
    _check_sides(height + margins.top + margins.bottom, width + margins.left + margins.right)
    pixels = resized(pixels, height, width)
    if marked is not None and marked.shape != (height, width):
        marked = np.asarray(Image.fromarray(marked).resize((width, height), Image.Resampling.NEAREST))
    if any(margins):
        marked = np.zeros((height, width), np.uint8) if marked is None else marked
        pixels, marked = _extended(pixels, marked, margins)
    if marked is not None and blur:
        marked = _blurred(marked, margins, blur)
    if marked is not None and not marked.any():
        raise ConfigError("the mask has no white: nothing would be drawn")
    whole = Canvas(pixels, marked, pixels.shape[:2], margins, names)
    return _padded(whole if closeup is None else _closeup(whole, *closeup), multiple)


def _closeup(whole: Canvas, padding: int, size: tuple[int, int]) -> Canvas:
    """The masked part of a canvas, resized."""
    if whole.mask is None:
        raise ConfigError("padding_mask_crop requires a mask or outpainting")
    box = box_of(whole.mask, padding, size)
    part = Image.fromarray(box.of(whole.mask).astype(np.float32))  # whole numbers would lose a dot
    if ((whole.mask > 0) & (whole.mask < 255)).any():
        mask = np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR)).round().astype(np.uint8)
    else:  # a hard mask stays hard
        mask = np.where(np.asarray(part.resize(size[::-1], Image.Resampling.BOX)) > 0, np.uint8(255), np.uint8(0))
    return replace(
        whole,
        pixels=resized(np.ascontiguousarray(box.of(whole.pixels)), *size),
        mask=mask,
        size=size,
        closeup=Closeup(whole.pixels, whole.mask, box),
    )


def _mixed(image: Array, pixels: np.ndarray, mask: np.ndarray, put: Put) -> Array:
    """An image (C, H, W) inside the mask, the given pixels outside, both mixed on its soft edge."""
    before = put(to_values((pixels if len(image) == 3 else luminance(pixels))[None])[0])
    share = put(mask.astype(np.float32) / 255)
    where = library(image).where
    return where(share == 1, image, where(share == 0, before, before + share * (image - before)))


def _check_sides(height: int, width: int) -> None:
    """Check the sides before any allocation. Raises ConfigError."""
    for name, side in (("height", height), ("width", width)):
        if not 1 <= side <= LONGEST:
            raise ConfigError(f"{name} with its margins must be from 1 to {LONGEST} (got {side})")


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) resized by Lanczos."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def reduced(pixels: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (H, W, 3), whose sides are multiples of `scale`, made so many times smaller by bicubic interpolation."""
    height, width = pixels.shape[:2]
    size = (width // scale, height // scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _extended(pixels: np.ndarray, marked: np.ndarray, margins: Margins) -> tuple[np.ndarray, np.ndarray]:
    """Outpainting: the edge's pixels repeated outwards, and marked to be drawn."""
    around = ((margins.top, margins.bottom), (margins.left, margins.right))
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), np.pad(marked, around, constant_values=255)


def _blurred(marked: np.ndarray, margins: Margins, deviation: float) -> np.ndarray:
    """The mask with a soft edge. What outpainting adds stays white: there is nothing to mix it with."""
    soft = np.array(Image.fromarray(marked).filter(ImageFilter.GaussianBlur(deviation)))
    height, width = marked.shape
    inside = np.zeros(marked.shape, bool)
    inside[margins.top : height - margins.bottom, margins.left : width - margins.right] = True
    soft[~inside] = 255
    return soft


def _padded(whole: Canvas, multiple: int) -> Canvas:
    height, width = whole.size
    below, right = -height % multiple, -width % multiple
    pixels = np.pad(whole.pixels, ((0, below), (0, right), (0, 0)), mode="edge")
    mask = None if whole.mask is None else np.pad(whole.mask, ((0, below), (0, right)), mode="edge")
    return replace(whole, pixels=pixels, mask=mask)


def pixels_of(image: Any) -> np.ndarray:
    """The pixels of an image. Raises ConfigError for anything that is not a picture."""
    if isinstance(image, Image.Image):
        return _decoded(image, "image", WHITE)
    array = _array(image, "image")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ConfigError(
            f"image must be a PIL image or uint8 (H, W, 3) (got {type(image).__name__}, {array.dtype} {array.shape})"
        )
    return array


def _decoded(image: Image.Image, name: str, background: Color) -> np.ndarray:
    """Pixels turned upright, with a background under transparent parts. Raises ConfigError."""
    try:
        return rgb(ImageOps.exif_transpose(image), background)
    except (DataError, OSError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors elsewhere
        raise ConfigError(f"{name} must be a PIL image or an array (got {type(values).__name__})") from None


def _marked(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask as uint8; almost black is made black, almost white white. Raises ConfigError for another size."""
    if isinstance(mask, Image.Image):
        mask = luminance(_decoded(mask, "mask_image", BLACK)[None])[0, ..., 0]
    array = _array(mask, "mask_image")
    if array.ndim != 2 or array.dtype not in (np.uint8, bool):
        raise ConfigError(f"mask_image must be a picture, or (H, W) of uint8 or bool (got {array.dtype} {array.shape})")
    if array.dtype == bool:
        array = np.uint8(255) * array
    if array.shape != size:
        sizes = [f"{width}x{height}" for height, width in (array.shape, size)]
        raise ConfigError(f"mask_image must have the size of the image: {sizes[0]}, the image is {sizes[1]}")
    return np.where(array < _ALMOST, 0, np.where(array > 255 - _ALMOST, 255, array)).astype(np.uint8)
