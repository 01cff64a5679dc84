"""Pictures as files hold them, uint8 (B, H, W, 3), and as networks see them, float (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_images(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]: 0 is -1, 255 is 1."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) about in [-1, 1] -> uint8 (B, H, W, 3), clamped and rounded."""
    import torch

    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())
