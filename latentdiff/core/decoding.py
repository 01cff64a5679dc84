"""Encoded picture files to pixels: every byte is decoded, and a file without a faithful rendering is refused.

The pixels of a picture are uint8 (H, W, 3), sRGB as stored (embedded colour profiles are not applied):

    orientation     turned upright by EXIF
    transparency    alpha channels, palette and key colours: (a c + (255 - a) background) / 255, rounded
    colour modes    1-bit, grey, palette and CMYK as Pillow converts them to RGB
    16 bits         grey is divided by 257 and rounded; colour keeps the high byte
    several frames  the first one
    float, int32    refused: nothing defines which value is white

Only a few well-maintained decoders are tried, whatever the file's name is.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from latentdiff.core.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".apng", ".ppm", ".pgm")
)
WHITE = (255, 255, 255)
LFS_POINTER = b"version https://git-lfs"  # how the text begins that a clone without Git LFS has in place of a file
MAX_PIXELS = 64_000_000
MAX_ASPECT = 16.0
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Decoded:
    """Pixels, Pillow's names of the file's colour mode and format, and whether it has more than one frame."""

    pixels: np.ndarray
    mode: str
    format: str
    is_animated: bool


def decode(data: bytes, background: Color = WHITE, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode a file's bytes as the module says. Raises DataError with only the reason: "truncated", "empty", ..."""
    if not data:
        raise DataError("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decoded(image, background, max_pixels)
    except (DataError, MemoryError):  # the machine's fault is not the picture's
        raise
    except Exception as error:  # decoders raise nearly anything on bytes that are not theirs
        raise DataError(fault(error, data)) from None


def fault(error: Exception, data: bytes) -> str:
    """What is wrong with bytes that Pillow does not decode, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return _what_else(data)
    return "too many pixels" if isinstance(error, Image.DecompressionBombError) else _reason(error)


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Silence Pillow's warnings and logs about large pictures and broken tags: `decode` reports each file once.

    libtiff, a C library that Pillow calls, still writes about broken TIFFs to standard error.
    """
    quiet = logging.NullHandler()  # without any handler, logging prints
    logging.getLogger("PIL").addHandler(quiet)
    try:
        with closing(quiet), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        logging.getLogger("PIL").removeHandler(quiet)


def _decoded(image: Image.Image, background: Color, max_pixels: int) -> Decoded:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"{width} x {height} are more than {max_pixels:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{width} x {height} is longer than {MAX_ASPECT:g} to 1")
    mode, kind = image.mode, image.format or "?"
    # a count of frames would read the whole file; MPO is a camera's JPEG with a second view or a preview
    is_animated = kind != "MPO" and bool(getattr(image, "is_animated", False))
    image.load()
    upright = ImageOps.exif_transpose(image)
    return Decoded(rgb(upright, background), mode, kind, is_animated)


def rgb(image: Image.Image, background: Color = WHITE) -> np.ndarray:
    """The pixels of a decoded, upright picture. Raises DataError for a colour mode without a defined white."""
    if image.mode.startswith("I;16"):
        return _grey16(np.asarray(image), image.info.get("transparency"), background)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise DataError(f"colour mode {image.mode} defines no white")
    if image.has_transparency_data:
        rgba, flat = image.convert("RGBA"), Image.new("RGB", image.size, background)
        flat.paste(rgba, mask=rgba)
        return np.asarray(flat)
    return np.asarray(image.convert("RGB"))


def _grey16(values: np.ndarray, transparent: object, background: Color) -> np.ndarray:
    """16-bit grey to 8 bits: divided by 65535 / 255 = 257 and rounded."""
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, -1)
    if isinstance(transparent, int):
        pixels[values == transparent] = background
    return pixels


def _what_else(data: bytes) -> str:
    """A message about bytes that no decoder knows."""
    if data.startswith(LFS_POINTER):
        return "only a pointer of Git LFS: git lfs pull fetches the file"
    head = data[:12].lstrip()
    if head[:1] == b"<":
        tag = data.lstrip()[:20].split(b">")[0].split(b" ")[0] + b">"
        return f'not an image: starts with "{tag.decode("ascii", "backslashreplace")}"'
    return f"not an image: starts with {data[:8].hex(' ')}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "truncated" in text or "Truncated" in text or isinstance(error, EOFError):
        return "truncated"
    return f"broken: {text[:80] or type(error).__name__}"
