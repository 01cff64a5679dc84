"""The tiny autoencoder (TAESD): diffusers.AutoencoderTiny."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from latentdiff.core.errors import ConfigError
from latentdiff.networks.codecs.autoencoder import Autoencoder


class TinyAutoencoder(Autoencoder):
    """Another autoencoder's latents in a fraction of the time, less exactly, and with no posterior."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__(vae)
        vae.spatial_scale_factor = self.factor  # for tiles; diffusers takes 2 to the power of the image's channels

    @classmethod
    def create(
        cls,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int = 1,
        image_channels: int = 3,
    ) -> TinyAutoencoder:
        """A new one with random weights, and no normalisation; all its levels are of one width."""
        vae = AutoencoderTiny(
            in_channels=image_channels,
            out_channels=image_channels,
            encoder_block_out_channels=block_out_channels,
            decoder_block_out_channels=block_out_channels,
            num_encoder_blocks=(1, *(layers_per_block for _ in block_out_channels[1:])),
            num_decoder_blocks=(*(layers_per_block for _ in block_out_channels[1:]), 1),
            latent_channels=latent_channels,
        )
        return cls(vae)

    @contextmanager
    def piecewise(self, *, tiles: bool, slices: bool) -> Iterator[None]:
        """See Codec. Raises ConfigError where diffusers' tiles, of 4 channels from 3, do not fit."""
        if tiles and (self.latent_channels, self.image_channels) != (4, 3):
            raise ConfigError("vae_tiling requires a tiny VAE of 3 image channels and 4 latent channels")
        with super().piecewise(tiles=tiles, slices=slices):
            yield

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and a log-variance of minus infinity."""
        latents = (self.vae.encode(images).latents - self.shift) * self.scale
        return latents, torch.full_like(latents, -torch.inf)

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        """Another's latents decoded, and its own of the images."""
        return self.decode(latents), self.encode(images)[0]
