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
    """An approximation of another autoencoder in a fraction of its time, without a posterior."""

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
        """A new autoencoder with random weights and without normalisation; all its levels have one width."""
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
        """See Codec. Raises ConfigError unless 3 channels become 4, which diffusers' tiles require."""
        if tiles and (self.latent_channels, self.image_channels) != (4, 3):
            raise ConfigError("vae_tiling requires a tiny VAE of 3 image channels and 4 latent channels")
        with super().piecewise(tiles=tiles, slices=slices):
            yield

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and a log-variance of minus infinity."""
        latents = (self.vae.encode(images).latents - self.shift) * self.scale
        return latents, torch.full_like(latents, -torch.inf)

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        """The decoded latents of the other autoencoder, and this one's latents of the images."""
        return self.decode(latents), self.encode(images)[0]
