"""Pictures as files hold them, uint8 (B, H, W, C), and as networks see them, float (B, C, H, W) in [-1, 1].

C is 3, or 1 for grey pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentdiff.core.arrays import Array, to_numpy

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def to_values(pictures: np.ndarray) -> NDArray[np.float32]:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]: 0 is -1, 255 is 1."""
    scaled = pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def to_images(pictures: np.ndarray) -> Tensor:
    """`to_values` as a tensor."""
    import torch

    return torch.from_numpy(to_values(pictures))


def to_uint8(images: Array) -> NDArray[np.uint8]:
    """(B, C, H, W), clamped to [-1, 1] -> uint8 (B, H, W, C), rounded."""
    scaled = np.rint((to_numpy(images).clip(-1, 1) + np.float32(1)) * np.float32(127.5))
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1).astype(np.uint8))


def as_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) as PIL's picture."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))


def coloured(pictures: np.ndarray) -> np.ndarray:
    """Pictures with three channels; a grey picture's channel is repeated."""
    return pictures if pictures.shape[-1] == 3 else pictures.repeat(3, -1)


def luminance(pictures: np.ndarray) -> np.ndarray:
    """Colour to grey, uint8 (B, H, W, 3) -> (B, H, W, 1): ITU-R 601, 0.299 R + 0.587 G + 0.114 B, rounded."""
    grey = pictures @ np.array([0.299, 0.587, 0.114])
    return np.asarray(np.rint(grey), np.uint8)[..., None]
