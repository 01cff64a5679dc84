"""No compression: the latents are the pixels, and the same code is a pixel-space DDPM (Ho et al. 2020)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class IdentityCodec(nn.Module):
    """Images are their own latents; the posterior is a point."""

    factor = 1
    dtype = torch.float32

    def __init__(self, channels: int = 3):
        super().__init__()
        self.latent_channels = self.image_channels = channels

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.latent_channels, *size

    def piecewise(self, *, tiles: bool, slices: bool) -> AbstractContextManager[None]:
        """A block in which nothing changes: there is nothing to compute."""
        return nullcontext()

    def in_float32(self) -> AbstractContextManager[None]:
        """A block in which nothing changes: it computes in float32."""
        return nullcontext()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images themselves with variance zero."""
        return images, torch.full_like(images, -torch.inf)

    posterior = encode

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    latents_of = images_of = decode

    def traced(self) -> dict[str, Any]:
        """See Traceable: nothing is computed."""
        return {}

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        return {"kind": "identity", "image_channels": self.image_channels}

    def save(self, directory: Path) -> None:
        """Write nothing: a model folder without a VAE holds a pixel-space model."""
