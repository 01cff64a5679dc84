"""The autoencoder's stages: reconstruction in value and in gradient, from latents of its own or of another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.core.images import to_images
from latentdiff.diffusion import noise

if TYPE_CHECKING:
    from latentdiff.networks.codecs.autoencoder import Autoencoder

Picture = Callable[[int], tuple[np.ndarray, str]]  # uint8 (H, W, C) and its name


class AutoencoderStage:
    """loss = |x - x^| + w_g |grad x - grad x^| + w_kl KL(q(z|x) || N(0, I)), means over values.

    The L1 of the horizontal and vertical differences keeps edges sharp at a fraction of what a perceptual
    network would cost. Trained on random crops: the networks are fully convolutional.
    """

    divisible = True
    teacher: Autoencoder | None = None

    def __init__(
        self,
        module: Autoencoder,
        picture: Picture,
        *,
        seed: int,
        crop: int,
        latent_shape: tuple[int, int, int],
        gradient_weight: float,
        kl_weight: float,
    ):
        self.module = module
        self.parts: dict[str, nn.Module] = {"autoencoder": module}
        self._picture, self._seed, self._crop, self._latent_shape = picture, seed, crop, latent_shape
        self._gradient_weight, self._kl_weight = gradient_weight, kl_weight

    def batch(self, positions: range) -> dict[str, Tensor]:
        """Crops (B, 3, c, c) in [-1, 1] and the standard normal draws for their latents."""
        images = to_images(np.stack([self._crop_of(index) for index in positions]))
        eps = [noise.normal(self._latent_shape, self._seed, "autoencoder posterior", index) for index in positions]
        return {"images": images, "noise": torch.from_numpy(np.stack(eps))}

    def _crop_of(self, index: int) -> np.ndarray:
        picture, _ = self._picture(index)
        high = (picture.shape[0] - self._crop + 1, picture.shape[1] - self._crop + 1)
        top, left = noise.generator(self._seed, "crop", index).integers(high)
        return picture[top : top + self._crop, left : left + self._crop]

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See the class; (B,)."""
        reconstruction, mean, log_variance = module(batch["images"], batch["noise"])
        loss = self._distance(reconstruction, batch["images"])
        kl = 0.5 * _mean(mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float())
        return loss + self._kl_weight * kl

    def _distance(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        difference = reconstruction.float() - images
        edges = _mean(difference.diff(dim=-1).abs()) + _mean(difference.diff(dim=-2).abs())
        return _mean(difference.abs()) + self._gradient_weight * edges

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images decoded from the posterior's mean, the teacher's if there is one."""
        return self.module.decode((self.teacher or self.module).encode(images)[0])

    def sample_ids(self, positions: range) -> list[str]:
        """The names of the pictures."""
        return [self._picture(position)[1] for position in positions]


class TinyAutoencoderStage(AutoencoderStage):
    """loss = |x - D(z)| + w_g |grad x - grad D(z)| + w_z |E(x) - mean|, with z ~ N(mean, std) the teacher's.

    D reads samples of the teacher's posterior, like the denoiser's latents, and learns the pictures themselves, not the
    teacher's reconstructions.
    """

    def __init__(
        self, module: Autoencoder, picture: Picture, teacher: Autoencoder, *, latent_weight: float, **more: Any
    ):
        super().__init__(module, picture, kl_weight=0.0, **more)
        self.teacher: Autoencoder = teacher.requires_grad_(False).eval()
        self._latent_weight = latent_weight

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See the class; (B,)."""
        images = batch["images"]
        with torch.no_grad():
            mean, log_variance = self.teacher.encode(images)
        reconstruction, latents = module(images, mean + (0.5 * log_variance).exp() * batch["noise"])
        return self._distance(reconstruction, images) + self._latent_weight * _mean((latents.float() - mean).abs())


def _mean(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(1)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from the mean squared error of the whole batch."""
    error = (images - reconstructions.clamp(-1, 1)).pow(2).mean()
    return float(10 * torch.log10(4 / error))
