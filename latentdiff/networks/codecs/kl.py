"""Images to latents and back: diffusers' autoencoders, with unit-variance latents on this side of the border.

Scale and shift of the latents live in this file and nowhere else. Models trained here have them folded into
the 1 x 1 convolutions around the latents (`fold_statistics`), so that their scaling_factor is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError
from latentdiff.networks.saving import save_network

SMALLEST_TILE = 512  # pixels; diffusers takes the size a model was trained for, which may be tiny


class Autoencoder(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/f, W/f) of about unit variance."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels, self.image_channels = int(vae.config.latent_channels), int(vae.config.out_channels)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)
        vae.tile_sample_min_size = max(int(vae.config.get("sample_size", 0)), SMALLEST_TILE)
        vae.tile_latent_min_size = vae.tile_sample_min_size // self.factor

    @classmethod
    def create(
        cls,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        image_channels: int = 3,
    ) -> Autoencoder:
        """A new one with random weights, without attention in the middle."""
        levels = len(block_out_channels)
        vae = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            scaling_factor=1.0,
            mid_block_add_attention=False,
            force_upcast=False,
        )
        return cls(vae)

    @property
    def has_posterior(self) -> bool:
        """Whether the latents of an image are a distribution, under which pixels have a likelihood."""
        return isinstance(self.vae, AutoencoderKL)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Its weights widened, and narrowed again to the very bits they were."""
        dtype = self.dtype
        self.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.to(dtype=dtype)

    def piecewise(self, *, tiles: bool, slices: bool) -> None:
        """Less memory for large pictures: overlapping tiles that are blended, one picture of a batch at a time."""
        self.vae.use_tiling, self.vae.use_slicing = tiles, slices

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior q(x0 | image), (B, C, H/f, W/f) each."""
        posterior = self.vae.encode(images).latent_dist
        return (posterior.mean - self.shift) * self.scale, posterior.logvar + 2 * math.log(self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1]."""
        images: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return images

    @torch.no_grad()
    def latents_of(self, images: Tensor) -> Tensor:
        """The posterior's mean, float32, computed in the weights' precision without gradients."""
        return self.encode(images.to(self.dtype))[0].float()

    @torch.no_grad()
    def images_of(self, latents: Tensor) -> Tensor:
        """`decode` in the weights' precision without gradients; float32."""
        return self.decode(latents.to(self.dtype)).float()

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        """Reconstruction through a posterior sample mean + std * eps, and the posterior's mean and log-variance."""
        mean, log_variance = self.encode(images)
        return self.decode(mean + (0.5 * log_variance).exp() * eps), mean, log_variance

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Whiten: after this, latents whose channels had this mean and std (C,) have 0 and 1.

        z' = (z - mean) / std is an affine map of each channel, so it is absorbed by the 1 x 1 convolution that
        makes z, and its inverse by the one that reads z; no number is left to carry beside the weights.
        """
        quant, post = self.vae.quant_conv, self.vae.post_quant_conv
        channels = self.latent_channels
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights."""
        save_network(self.vae, directory)


class TinyAutoencoder(Autoencoder):
    """diffusers.AutoencoderTiny: another's latents in a fraction of the time, less exactly, and with no posterior."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__(vae)
        vae.spatial_scale_factor = self.factor  # of tiles; diffusers takes 2 to the power of the image's channels

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

    def piecewise(self, *, tiles: bool, slices: bool) -> None:
        """See Autoencoder. Raises ConfigError where diffusers' tiles, of 4 channels from 3, do not fit."""
        if tiles and (self.latent_channels, self.image_channels) != (4, 3):
            raise ConfigError("vae_tiling: a tiny VAE of other than 3 and 4 channels does not work in tiles")
        super().piecewise(tiles=tiles, slices=slices)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and a log-variance of minus infinity."""
        latents = (self.vae.encode(images).latents - self.shift) * self.scale
        return latents, torch.full_like(latents, -torch.inf)

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        """Another's latents decoded, and its own of the images."""
        return self.decode(latents), self.encode(images)[0]


def misfit(autoencoder: Any, another: Any) -> str | None:
    """Why another autoencoder has no latents of the same shape, None where it has."""
    for what in ("factor", "latent_channels", "image_channels"):
        if (theirs := getattr(another, what)) != (ours := getattr(autoencoder, what)):
            return f"its {what} is {theirs}, not {ours}"
    return None


class IdentityAutoencoder(nn.Module):
    """No compression: the latents are the pixels, and the same code is a pixel-space DDPM (Ho et al. 2020)."""

    factor = 1
    dtype = torch.float32
    has_posterior = True  # a point, at which the latents are the pixels

    def __init__(self, channels: int = 3):
        super().__init__()
        self.latent_channels = self.image_channels = channels

    def piecewise(self, *, tiles: bool, slices: bool) -> None:
        """Nothing to compute, in pieces or not."""

    def in_float32(self) -> AbstractContextManager[None]:
        """It is."""
        return nullcontext()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images themselves with variance zero."""
        return images, torch.full_like(images, -torch.inf)

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    latents_of = images_of = decode

    def save(self, directory: Path) -> None:
        """Nothing to write: a model folder without a VAE is a pixel-space model."""
