"""diffusers' autoencoders as codecs, with unit-variance latents on this side of the border."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced, example

SMALLEST_TILE = 512  # pixels; diffusers takes the size a model was trained for, which may be tiny
PART = "vae"
SIZES = ((3, 5, 7), (1, 4, 3))  # rows, height and width of latents for a tracer


class Autoencoder(nn.Module):
    """images (B, C, H, W) in [-1, 1] <-> latents (B, L, H/f, W/f) of about unit variance.

    Scale and shift of the latents live in this folder and nowhere else. Models trained here have them folded into the
    1 x 1 convolutions around the latents (`KLAutoencoder.fold_statistics`), so that their scaling_factor is 1.
    """

    def __init__(self, vae: Any):
        super().__init__()
        self.vae, self._turn, config = vae, Turn(), vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels, self.image_channels = int(config.latent_channels), int(config.out_channels)
        self.scale, self.shift = float(config.get("scaling_factor", 1.0)), float(config.get("shift_factor") or 0.0)
        vae.tile_sample_min_size = max(int(config.get("sample_size", 0)), SMALLEST_TILE)
        vae.tile_latent_min_size = vae.tile_sample_min_size // self.factor

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """See Codec."""
        return self.latent_channels, size[0] // self.factor, size[1] // self.factor

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """A block with the weights in float32; afterwards they have their old precision and bits again."""
        with self._turn:
            dtype = self.dtype
            self.to(dtype=torch.float32)
            try:
                yield
            finally:
                self.to(dtype=dtype)

    @contextmanager
    def piecewise(self, *, tiles: bool, slices: bool) -> Iterator[None]:
        """See Codec. Overlapping tiles are blended."""
        with self._turn:
            before = self.vae.use_tiling, self.vae.use_slicing
            self.vae.use_tiling, self.vae.use_slicing = tiles, slices
            try:
                yield
            finally:
                self.vae.use_tiling, self.vae.use_slicing = before

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of images, (B, L, H/f, W/f) each, with gradients."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), about in [-1, 1], with gradients."""
        images: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return images

    @torch.no_grad()
    def latents_of(self, images: Tensor) -> Tensor:
        """The mean of the latents, float32, computed in the weights' precision without gradients."""
        with self._turn:
            return self.encode(images.to(self.dtype))[0].float()

    @torch.no_grad()
    def images_of(self, latents: Tensor) -> Tensor:
        """`decode` in the weights' precision without gradients; float32."""
        with self._turn:
            return self.decode(latents.to(self.dtype)).float()

    def traced(self) -> dict[str, Traced]:
        """Latents -> images, and images -> the latents' mean."""
        latents = [example(rows, *self.shape((y * self.factor, x * self.factor))) for rows, y, x in SIZES]
        images = [example(rows, self.image_channels, y * self.factor, x * self.factor) for rows, y, x in SIZES]
        return {
            f"{PART}_decoder": Traced(PART, self.vae, self.decode, [{"latents": each} for each in latents]),
            f"{PART}_encoder": Traced(
                PART, self.vae, lambda images: self.encode(images)[0], [{"images": each} for each in images]
            ),
        }

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        return {
            "kind": "autoencoder",
            "factor": self.factor,
            "latent_channels": self.latent_channels,
            "image_channels": self.image_channels,
            "shows": False,
            "scale": self.scale,
        }

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights."""
        save_network(self.vae, directory)


def misfit(autoencoder: Any, another: Any) -> str | None:
    """Why the latents of another autoencoder have a different shape; None if they have the same."""
    for what in ("factor", "latent_channels", "image_channels"):
        if (theirs := getattr(another, what)) != (ours := getattr(autoencoder, what)):
            return f"its {what} is {theirs}, not {ours}"
    return None
