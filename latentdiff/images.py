"""Pictures as files hold them, uint8 (B, H, W, C), and as networks see them, float (B, C, H, W) in [-1, 1].

C is 3, or 1 for grey pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_images(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]: 0 is -1, 255 is 1."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) about in [-1, 1] -> uint8 (B, H, W, C), clamped and rounded."""
    import torch

    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())


def luminance(pictures: np.ndarray) -> np.ndarray:
    """Colour to grey, uint8 (B, H, W, 3) -> (B, H, W, 1): ITU-R 601, 0.299 R + 0.587 G + 0.114 B, rounded."""
    grey = pictures @ np.array([0.299, 0.587, 0.114])
    return np.asarray(np.rint(grey), np.uint8)[..., None]
