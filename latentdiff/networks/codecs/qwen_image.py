"""The autoencoder of Qwen-Image: diffusers.AutoencoderKLQwenImage, made for videos; a picture is a video of one frame.

Its config lists mean and standard deviation of each channel of the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.codecs.kl import KLAutoencoder


class QwenImageAutoencoder(KLAutoencoder):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, L, H/f, W/f)."""

    def __init__(self, vae: Any):
        nn.Module.__init__(self)
        self.vae, self._turn, config = vae, Turn(), vae.config
        self.factor = 2 ** len(config.temperal_downsample)
        self.latent_channels, self.image_channels = int(config.z_dim), int(config.input_channels)
        self.scale, self.shift = 1.0, 0.0
        for module in vae.modules():
            if isinstance(module, nn.Upsample) and module.mode == "nearest-exact":
                module.mode = "nearest"  # the same for twice the size, and known to tracers

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, with gradients."""
        posterior, (mean, std) = self.vae.encode(images.unsqueeze(2)).latent_dist, self._statistics(images)
        return (posterior.mean.squeeze(2) - mean) / std, posterior.logvar.squeeze(2) - 2 * std.log()

    def decode(self, latents: Tensor) -> Tensor:
        """See Autoencoder."""
        mean, std = self._statistics(latents)
        images: Tensor = self.vae.decode((latents * std + mean).unsqueeze(2)).sample.squeeze(2)
        return images

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, L, 1, 1)."""
        config = self.vae.config
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1).to(like) for each in (config.latents_mean, config.latents_std)
        )
        return mean, std
