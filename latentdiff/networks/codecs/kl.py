"""The variational autoencoder (Kingma & Welling 2014) of latent diffusion: diffusers.AutoencoderKL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.networks.codecs.autoencoder import Autoencoder


class _NoEncoder(nn.Module):
    def forward(self, images: Tensor) -> NoReturn:
        raise ModelError("this VAE has no encoder, which input pictures require. Name a complete one: --vae, load_vae")


def without_encoder(vae: AutoencoderKL) -> None:
    """Remove the encoder of a VAE whose file holds the decoder alone. Encoding then raises ModelError."""
    vae.encoder, vae.quant_conv = _NoEncoder(), None


class KLAutoencoder(Autoencoder):
    """The latents of an image have a Gaussian posterior; sampling uses its mean."""

    @classmethod
    def create(
        cls,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        image_channels: int = 3,
    ) -> KLAutoencoder:
        """A new autoencoder with random weights, without attention in the middle."""
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

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior q(x0 | image), (B, L, H/f, W/f) each, with gradients."""
        posterior = self.vae.encode(images).latent_dist
        return (posterior.mean - self.shift) * self.scale, posterior.logvar + 2 * math.log(self.scale)

    @property
    def has_encoder(self) -> bool:
        """Whether pictures can be encoded; some files hold the decoder alone."""
        return not isinstance(self.vae.encoder, _NoEncoder)

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights. Raises ConfigError for a VAE without an encoder."""
        if not self.has_encoder:
            raise ConfigError("a model folder requires a complete VAE; this one has no encoder")
        super().save(directory)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `encode` and Posterior."""
        return self.encode(images)

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        """Reconstruction through a posterior sample mean + std * eps, and the posterior's mean and log-variance."""
        mean, log_variance = self.encode(images)
        return self.decode(mean + (0.5 * log_variance).exp() * eps), mean, log_variance

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Whiten: channels that had this mean and std (C,) have mean 0 and std 1 afterwards.

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
