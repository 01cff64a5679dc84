"""The autoencoder's stage: reconstruction in value and in gradient, with a light pull to unit variance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion import noise
from latentdiff.images import to_images

Picture = Callable[[int], np.ndarray]


class AutoencoderStage:
    """loss = |x - x^| + w_g |grad x - grad x^| + w_kl KL(q(z|x) || N(0, I)), means over values.

    The L1 of the horizontal and vertical differences keeps edges sharp at a fraction of what a perceptual
    network would cost. Trained on random crops: the networks are fully convolutional.
    """

    def __init__(
        self,
        module: nn.Module,
        picture: Picture,
        *,
        seed: int,
        batch_size: int,
        crop: int,
        latent_shape: tuple[int, int, int],
        gradient_weight: float,
        kl_weight: float,
        device: torch.device,
    ):
        self.module = module
        self._picture, self._seed, self._batch_size, self._crop = picture, seed, batch_size, crop
        self._latent_shape = latent_shape
        self._gradient_weight, self._kl_weight, self._device = gradient_weight, kl_weight, device

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, c, c) in [-1, 1] and the standard normal draws for their latents."""
        first = index * self._batch_size
        crops = [self._crop_of(i) for i in range(first, first + self._batch_size)]
        images = to_images(np.stack(crops)).to(self._device)
        shape = (self._batch_size, *self._latent_shape)
        eps = torch.from_numpy(noise.normal(shape, self._seed, "autoencoder posterior", first))
        return images, eps.to(self._device)

    def _crop_of(self, index: int) -> np.ndarray:
        picture = self._picture(index)
        high = (picture.shape[0] - self._crop + 1, picture.shape[1] - self._crop + 1)
        top, left = noise.generator(self._seed, "crop", index).integers(high)
        return picture[top : top + self._crop, left : left + self._crop]

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """See the class."""
        images, eps = batch
        reconstruction, mean, log_variance = module(images, eps)
        difference = reconstruction.float() - images
        loss = difference.abs().mean() + self._gradient_weight * (
            difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        )
        kl = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        return loss + self._kl_weight * kl


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from the mean squared error of the whole batch."""
    error = (images - reconstructions.clamp(-1, 1)).pow(2).mean()
    return float(10 * torch.log10(4 / error))
