"""The autoencoder of FLUX.2: diffusers.AutoencoderKLFlux2, whose latents are normalised by the running statistics of a
batch norm over patches of 2 x 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentdiff.networks.codecs.autoencoder import PART
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.traced import Traced

PATCH = 2


class Flux2Autoencoder(KLAutoencoder):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, 4 L, H / 2 f, W / 2 f), each channel one place of a patch."""

    def __init__(self, vae: Any):
        super().__init__(vae)
        self.factor, self.latent_channels = self.factor * PATCH, self.latent_channels * PATCH**2

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, with gradients."""
        posterior, (mean, std) = self.vae.encode(images).latent_dist, self._statistics()
        normalised = (pixel_unshuffle(posterior.mean, PATCH) - mean) / std
        return normalised, pixel_unshuffle(posterior.logvar, PATCH) - 2 * std.log()

    def decode(self, latents: Tensor) -> Tensor:
        """See Autoencoder."""
        images: Tensor = self.vae.decode(self.to_diffusers(latents)).sample
        return images

    def to_diffusers(self, latents: Tensor) -> Tensor:
        """The latents (B, L, H / f, W / f) of the VAE itself, which diffusers' pipelines return."""
        mean, std = self._statistics()
        return pixel_shuffle(latents * std + mean, PATCH)

    def traced(self) -> dict[str, Traced]:
        """See Autoencoder; and `to_diffusers`."""
        graphs = super().traced()
        return graphs | {f"{PART}_shown": replace(graphs[f"{PART}_decoder"], function=self.to_diffusers)}

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        return super().facts() | {"shows": True}

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, 4 L, 1, 1)."""
        norm = self.vae.bn
        mean, variance = (each.view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.vae.config.batch_norm_eps)
